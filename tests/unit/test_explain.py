"""What the teachers saw, rebuilt from fingerprints alone, and what the student sees."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from store_support import EXECUTION
from transformers import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from olapipe.explain import describe_step, explain, replay
from olapipe.teachers import registry
from olapipe.teachers.base import Preset, Teacher, TeacherSettings
from olaschema.errors import ConfigError, ImageError, StoreError, TeacherError
from olaschema.images import DecodedImage, decode_image
from olaschema.manifest import ChannelStatistics, Preprocessing, RowReceipt, SampleRow, Step, TeacherRecord, View
from olaschema.precision import Stored
from olaschema.store import FeatureStore

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("depth", "seg", "gen")


def photograph(width: int, height: int, *, orientation: int = 1) -> DecodedImage:
    rng = np.random.default_rng(width * 10_000 + height)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    rgb.save(buffer, format="JPEG", exif=exif)
    return decode_image(buffer.getvalue(), name="photograph.jpg")


IMAGES = {
    **{file.name: decode_image(file.read_bytes(), name=file.name) for file in sorted((GOLDEN / "images").iterdir())},
    "odd": photograph(301, 227),
    "upright": photograph(101, 250),
    "turned": photograph(320, 201, orientation=6),
    "wide": photograph(640, 131),
    "small": photograph(20, 31),
    "exact": photograph(224, 299),
}


@pytest.fixture(scope="module")
def loaded() -> dict[tuple[str, Preset], Teacher]:
    return {
        (name, preset): registry.load(name, TeacherSettings(str(GOLDEN / name), preset=preset))
        for name in NAMES
        for preset in ("default", "ola-vlm")
    }


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("preset", ["default", "ola-vlm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fingerprint_alone_gives_the_teachers_own_pixels_bit_by_bit(
    name: str, preset: Preset, image: str, loaded: dict[tuple[str, Preset], Teacher]
) -> None:
    teacher = loaded[name, preset]
    told = Preprocessing.model_validate_json(teacher.fingerprint.preprocessing.model_dump_json())  # as a store keeps it
    seen = replay(told, IMAGES[image], teacher=name)
    expected = teacher.preprocessor(IMAGES[image])
    assert seen.pixels_chw.dtype == np.float32
    assert np.array_equal(seen.pixels_chw, expected)


@pytest.mark.parametrize(
    "size", [(1280, 500), (500, 1280), (1333, 800), (800, 1400), (3000, 799), (640, 480), (668, 300)]
)
def test_sizes_with_a_longest_edge_are_those_of_transformers(size: tuple[int, int]) -> None:
    # the seg teacher squashes first, so its longest edge never decides there; other teachers may not
    from transformers.models.oneformer.image_processing_pil_oneformer import OneFormerImageProcessorPil

    image = photograph(*size)
    edges = {"shortest_edge": 400, "longest_edge": 667}
    step = Step(name="resize", values={**edges, "filter": "bilinear", "library": "pillow"})
    seen = replay(_steps(step), image, teacher="seg")
    processor = OneFormerImageProcessorPil(size=edges, resample=2, do_rescale=False, do_normalize=False)
    expected = processor.preprocess(images=[np.asarray(image.rgb)], return_tensors="np")["pixel_values"][0]
    assert np.array_equal(seen.pixels_chw, expected)


def _steps(*steps: Step) -> Preprocessing:
    view = View(kind="squash")
    return Preprocessing(processor="P", backend="pil", channel_order="rgb", exif=True, view=view, steps=steps)


def test_what_is_shown_is_what_went_in(loaded: dict[tuple[str, Preset], Teacher]) -> None:
    image = photograph(336, 336)
    rgb = np.asarray(image.rgb)
    plain = replay(loaded["depth", "default"].fingerprint.preprocessing, image, teacher="depth")
    swapped = replay(loaded["depth", "ola-vlm"].fingerprint.preprocessing, image, teacher="depth")
    assert np.array_equal(plain.visible, rgb)
    assert np.array_equal(swapped.visible, rgb[..., ::-1])  # fed BGR, it saw red as blue


def test_a_step_is_described_with_all_its_values() -> None:
    step = Step(name="normalise", values={"mean": (0.5, 0.25, 1.0), "std": (1.0, 2.0, 3.0)})
    assert describe_step(step) == "normalise mean=(0.5, 0.25, 1.0) std=(1.0, 2.0, 3.0)"
    assert describe_step(Step(name="orient", values={"exif": False})) == "orient exif=false"
    assert describe_step(Step(name="sharpen")) == "sharpen"


def test_an_unknown_step_is_named() -> None:
    with pytest.raises(TeacherError, match=r"dinov9: its fingerprint has a preprocessing step 'sharpen'"):
        replay(_steps(Step(name="sharpen")), photograph(8, 8), teacher="dinov9")


def test_an_image_too_elongated_for_the_teacher_is_not_blown_up() -> None:
    step = Step(name="resize", values={"shortest_edge": 4000, "filter": "bicubic", "library": "pillow"})
    with pytest.raises(ImageError, match="too elongated: resizing it would make 40000 x 4000 pixels"):
        replay(_steps(step), photograph(200, 20), teacher="gen")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    shutil.copytree(GOLDEN / "images", folder)
    rng = np.random.default_rng(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(folder / "turned.jpg", exif=exif)
    return folder


@pytest.fixture
def store(corpus: Path, tmp_path: Path, loaded: dict[tuple[str, Preset], Teacher]) -> FeatureStore:
    """Three teachers; the features themselves do not matter here. One image failed under `gen`."""
    files = sorted(corpus.iterdir())
    store = FeatureStore.create(tmp_path / "features.zarr", rows_per_shard=len(files))
    store.add_generation([SampleRow(row=0, key=f.name, uri=f.name, size=f.stat().st_size) for f in files])
    for name in NAMES:
        teacher = loaded[name, "default"]
        made = TeacherRecord(
            fingerprint=teacher.fingerprint, precision="float32", source=name, licence="MIT", libraries={}
        )
        store.put_teacher(made)
        values = np.full((len(files), *teacher.fingerprint.shape), 1.0, np.float32)
        rows = [RowReceipt(status="ok", sha256=hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
        if name == "gen":
            values[1] = np.nan
            rows[1] = RowReceipt(status="failed", reason="not-finite", sha256=rows[1].sha256)
        store.commit_shard(made, 0, Stored(values), rows, ChannelStatistics(teacher.fingerprint.channels), EXECUTION)
    return store


def test_teachers_and_student_are_shown_side_by_side_with_every_value(
    store: FeatureStore, corpus: Path, tmp_path: Path, loaded: dict[tuple[str, Preset], Teacher]
) -> None:
    student = GOLDEN / "e2e" / "clip-vit-tiny"
    page = explain(store, "astronaut.png", corpus, student=student)
    assert [cell.title for cell in page.rows[0] if cell] == [
        "image", "depth saw", "gen saw", "seg saw", "the student sees",
    ]  # fmt: skip
    text = "\n".join(page.lines)
    for name in NAMES:
        for step in loaded[name, "default"].fingerprint.preprocessing.steps:
            assert describe_step(step) in text
    assert "3. resize filter=bicubic library=pillow shortest_edge=224 -> 298 x 224" in text
    assert "sees the largest centred square of the image" in text
    for line in ("size=shortest_edge:336", "resample=bicubic", "crop_size=height:336 width:336", "-> 336 x 336"):
        assert f"  {line}" in page.lines
    assert "image_mean=(0.481455, 0.457827, 0.408211)" in text

    config = json.loads((student / "preprocessor_config.json").read_text())
    processor = CLIPImageProcessorPil(
        size=config["size"], crop_size=config["crop_size"], resample=3, do_rescale=False, do_normalize=False
    )
    with Image.open(corpus / "astronaut.png") as image:
        expected = processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    shown = page.rows[0][-1]
    assert shown is not None and np.array_equal(shown.rgb, expected)
    page.save(tmp_path / "explain.png")
    with Image.open(tmp_path / "explain.png") as picture:
        assert picture.size[0] == 5 * 320 + 6 * 16


def test_the_student_turns_images_as_the_teachers_did_and_pads_as_its_processor_says(
    store: FeatureStore, corpus: Path, tmp_path: Path
) -> None:
    square = {"height": 64, "width": 64}
    LlavaImageProcessorPil(size=square, crop_size=square, do_center_crop=False, do_pad=True).save_pretrained(
        tmp_path / "s"
    )
    page = explain(store, "turned.jpg", corpus, student=tmp_path / "s")
    text = "\n".join(page.lines)
    assert "image: 120 x 90, EXIF orientation 6, shown as stored" in text
    assert "1. orient exif=true -> 90 x 120" in text
    assert "  do_pad=true" in page.lines
    shown = page.rows[0][-1]
    assert shown is not None and shown.rgb is not None and shown.rgb.shape == (64, 64, 3)
    # upright it is 90 × 120, so the padding of the square stands at the left and right, not above and below
    assert np.ptp(shown.rgb[:, :6].astype(int), axis=(0, 1)).max() <= 1
    assert np.ptp(shown.rgb[:6].astype(int), axis=(0, 1)).max() > 100


def test_a_failed_row_is_explained_too(store: FeatureStore, corpus: Path) -> None:
    page = explain(store, "coffee.png", corpus)
    assert "  no feature: not-finite" in page.lines
    assert [cell.title for cell in page.rows[0] if cell] == ["image", "depth saw", "gen saw", "seg saw"]
    assert "  no feature: not-finite" not in explain(store, "coffee.png", corpus, teachers=["depth"]).lines


def test_unknown_keys_and_other_images_are_refused(store: FeatureStore, corpus: Path) -> None:
    with pytest.raises(StoreError, match=r"has no image 'astronauts\.png'") as error:
        explain(store, "astronauts.png", corpus)
    assert error.value.remedy == "Did you mean 'astronaut.png'?"
    data = bytearray((corpus / "coffee.png").read_bytes())
    data[-20] ^= 1
    (corpus / "coffee.png").write_bytes(data)
    with pytest.raises(ImageError, match="is not the image that was extracted"):
        explain(store, "coffee.png", corpus)


def test_a_folder_without_a_usable_processor_is_refused(store: FeatureStore, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        explain(store, "coffee.png", corpus, student=tmp_path / "nowhere")
    (tmp_path / "student").mkdir()
    with pytest.raises(ConfigError, match="its image processor cannot be loaded"):
        explain(store, "coffee.png", corpus, student=tmp_path / "student")
