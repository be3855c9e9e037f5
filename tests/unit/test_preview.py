"""Stored features decoded back: against transformers' own models, and in what is said when something is missing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from store_support import EXECUTION, fill_shard, make_store, record
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessorPil,
    OneFormerForUniversalSegmentation,
)

from olapipe.preview import depth as depth_module
from olapipe.preview import page as page_module
from olapipe.preview import seg as seg_module
from olapipe.preview.base import Unavailable
from olapipe.preview.decoders import load_decoder
from olapipe.preview.page import PreviewSettings, preview
from olapipe.preview.panels import PcaColours, heat, strip
from olapipe.preview.panoptic import NOTHING, Panoptic, draw, merge_queries
from olapipe.preview.rows import find_sample
from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.errors import FingerprintError, ImageError, OlaError, StoreError, TeacherError
from olaschema.images import decode_image
from olaschema.manifest import ChannelStatistics, RowReceipt, SampleRow, TeacherRecord
from olaschema.precision import Stored
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGES = GOLDEN / "images"
FILES = sorted(IMAGES.iterdir())
KEY = "coffee.png"
CPU = torch.device("cpu")
BOUND = 1e-5


def close(actual: np.ndarray, expected: torch.Tensor) -> bool:
    error = np.linalg.norm(actual - expected.numpy()) / np.linalg.norm(expected.numpy())
    return actual.shape == tuple(expected.shape) and bool(error <= BOUND)


def store_of(root: Path, teachers: Sequence[Teacher], *, noise: float = 0.0, source: str | None = None) -> FeatureStore:
    """A store of the golden photographs, as extraction writes it; `noise` makes predictions of it."""
    store = FeatureStore.create(root, rows_per_shard=len(FILES))
    store.add_generation([SampleRow(row=0, key=f.name, uri=f.name, size=f.stat().st_size) for f in FILES])
    rng = np.random.default_rng(0)
    for teacher in teachers:
        made = TeacherRecord(
            fingerprint=teacher.fingerprint,
            precision="float32",
            source=source or teacher.source,
            licence=teacher.licence,
            libraries={},
        )
        store.put_teacher(made)
        values, rows = [], []
        statistics = ChannelStatistics(teacher.fingerprint.channels)
        for file in FILES:
            image = decode_image(file.read_bytes(), name=file.name)
            feature = teacher.encode(torch.from_numpy(teacher.preprocessor(image))[None])[0].numpy()
            feature = feature + noise * feature.std() * rng.normal(size=feature.shape).astype(np.float32)
            values.append(feature)
            statistics.update(feature[None])
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            rows.append(RowReceipt(status="ok", sha256=digest, width=image.rgb.width, height=image.rgb.height))
        store.commit_shard(made, 0, Stored(np.stack(values)), rows, statistics, EXECUTION)
    return store


TINY_WORDS = ("the", "task", "is", "panoptic")


def write_tokenizer(folder: Path) -> list[int]:
    """A CLIP tokenizer that knows the words of the task; returns their ids with start and end."""
    letters = sorted({letter for word in TINY_WORDS for letter in word})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in TINY_WORDS:
        left = word[0]
        for index, letter in enumerate(word[1:], start=1):
            right = f"{letter}</w>" if index == len(word) - 1 else letter
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}')
    words = [vocabulary[f"{word}</w>"] for word in TINY_WORDS]
    return [vocabulary["<|startoftext|>"], *words, vocabulary["<|endoftext|>"]]


@pytest.fixture(scope="module")
def seg_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The golden OneFormer with a tokenizer, and the ids of its task."""
    folder = tmp_path_factory.mktemp("checkpoints") / "seg"
    shutil.copytree(GOLDEN / "seg", folder)
    return folder, write_tokenizer(folder)


@pytest.fixture(scope="module")
def teachers() -> dict[str, Teacher]:
    return {name: registry.load(name, TeacherSettings(str(GOLDEN / name))) for name in ("depth", "seg", "gen")}


@pytest.fixture(scope="module")
def store(teachers: dict[str, Teacher], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return store_of(tmp_path_factory.mktemp("stores") / "features.zarr", list(teachers.values()))


@pytest.fixture(scope="module")
def depth_model() -> DepthAnythingForDepthEstimation:
    return DepthAnythingForDepthEstimation.from_pretrained(GOLDEN / "depth").eval()


def stored(store: FeatureStore, teacher: str, key: str = KEY) -> np.ndarray:
    return FeatureReader(store, teacher).feature(find_sample(store, key).row)


def pixels_of(teacher: Teacher, key: str = KEY) -> np.ndarray:
    return teacher.preprocessor(decode_image((IMAGES / key).read_bytes(), name=key))


# --- depth


def test_depth_from_the_store_equals_neck_and_head_of_transformers_on_the_mean_of_the_taps(
    store: FeatureStore, depth_model: DepthAnythingForDepthEstimation
) -> None:
    processor = DPTImageProcessorPil(
        size={"height": 336, "width": 336},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with Image.open(IMAGES / KEY) as image:
        pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        taps = depth_model.backbone.forward_with_filtered_kwargs(pixels).feature_maps
        mean = torch.stack(list(taps)).mean(dim=0)  # its class token included: the neck must not look at it
        expected = depth_model.head(depth_model.neck([mean] * 4, 24, 24), 24, 24)[0]
    fingerprint = store.teacher("depth").fingerprint
    decoder = load_decoder(fingerprint, str(GOLDEN / "depth"), "cpu")
    assert close(decoder.decode(stored(store, "depth"), None), expected)


def test_a_depth_map_that_stands_for_every_tap_is_read_as_the_full_model_reads_it(
    store: FeatureStore, depth_model: DepthAnythingForDepthEstimation, monkeypatch: pytest.MonkeyPatch
) -> None:
    feature = torch.from_numpy(stored(store, "depth")).reshape(1, 576, 48)
    tap = torch.cat((torch.full((1, 1, 48), 7.0), feature), dim=1)
    original = depth_model.backbone.forward_with_filtered_kwargs

    def replaced(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.feature_maps = (tap,) * 4
        return output

    monkeypatch.setattr(depth_model.backbone, "forward_with_filtered_kwargs", replaced)
    with torch.no_grad():
        expected = depth_model(torch.zeros(1, 3, 336, 336)).predicted_depth[0]
    decoder = load_decoder(store.teacher("depth").fingerprint, str(GOLDEN / "depth"), "cpu")
    assert close(decoder.decode(stored(store, "depth"), None), expected)


def test_the_full_depth_teacher_is_the_published_model(
    teachers: dict[str, Teacher], depth_model: DepthAnythingForDepthEstimation
) -> None:
    pixels = pixels_of(teachers["depth"])
    with torch.no_grad():
        expected = depth_model(torch.from_numpy(pixels)[None]).predicted_depth[0]
    decoder = load_decoder(teachers["depth"].fingerprint, str(GOLDEN / "depth"), "cpu")
    assert close(decoder.full(pixels), expected)


def test_the_full_depth_teacher_interpolates_positions_as_its_preset_says() -> None:
    teacher = registry.load("depth", TeacherSettings(str(GOLDEN / "depth"), preset="ola-vlm"))
    model = DepthAnythingForDepthEstimation.from_pretrained(GOLDEN / "depth").eval()
    trained = model.backbone.embeddings.position_embeddings.data
    patches = trained[:, 1:].reshape(1, 37, 37, 48).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(patches, scale_factor=(24.1 / 37, 24.1 / 37), mode="bicubic")
    tokens = resized.permute(0, 2, 3, 1).reshape(1, 576, 48)
    model.backbone.embeddings.position_embeddings = torch.nn.Parameter(torch.cat((trained[:, :1], tokens), dim=1))
    pixels = pixels_of(teacher)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)[None]).predicted_depth[0]
    assert close(load_decoder(teacher.fingerprint, str(GOLDEN / "depth"), "cpu").full(pixels), expected)


def original_naming(source: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """Rename the tensors of a Hugging Face file to those of the published `.pth` files."""
    plain = {
        "pretrained.cls_token": "backbone.embeddings.cls_token",
        "pretrained.pos_embed": "backbone.embeddings.position_embeddings",
    }
    for kind in ("weight", "bias"):
        plain[f"pretrained.patch_embed.proj.{kind}"] = f"backbone.embeddings.patch_embeddings.projection.{kind}"
        plain[f"pretrained.norm.{kind}"] = f"backbone.layernorm.{kind}"
        for level in range(4):
            stage = f"neck.reassemble_stage.layers.{level}"
            plain[f"depth_head.projects.{level}.{kind}"] = f"{stage}.projection.{kind}"
            if level != 2:
                plain[f"depth_head.resize_layers.{level}.{kind}"] = f"{stage}.resize.{kind}"
            fusion = f"neck.fusion_stage.layers.{3 - level}"
            refinenet = f"depth_head.scratch.refinenet{level + 1}"
            plain[f"{refinenet}.out_conv.{kind}"] = f"{fusion}.projection.{kind}"
            for unit in (1, 2):
                for number in (1, 2):
                    plain[f"{refinenet}.resConfUnit{unit}.conv{number}.{kind}"] = (
                        f"{fusion}.residual_layer{unit}.convolution{number}.{kind}"
                    )
        plain[f"depth_head.scratch.output_conv1.{kind}"] = f"head.conv1.{kind}"
        plain[f"depth_head.scratch.output_conv2.0.{kind}"] = f"head.conv2.{kind}"
        plain[f"depth_head.scratch.output_conv2.2.{kind}"] = f"head.conv3.{kind}"
    for level in range(4):
        plain[f"depth_head.scratch.layer{level + 1}_rn.weight"] = f"neck.convs.{level}.weight"
    made = {name: source[hub] for name, hub in plain.items()}
    for block in range(blocks):
        layer, ours = f"backbone.encoder.layer.{block}", f"pretrained.blocks.{block}"
        for scale in (1, 2):
            made[f"{ours}.ls{scale}.gamma"] = source[f"{layer}.layer_scale{scale}.lambda1"]
        for kind in ("weight", "bias"):
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                made[f"{ours}.{name}.{kind}"] = source[f"{layer}.{name}.{kind}"]
            made[f"{ours}.attn.proj.{kind}"] = source[f"{layer}.attention.output.dense.{kind}"]
            attention = f"{layer}.attention.attention"
            made[f"{ours}.attn.qkv.{kind}"] = torch.cat(
                [source[f"{attention}.{p}.{kind}"] for p in ("query", "key", "value")]
            )
    return made


def test_the_head_of_an_original_checkpoint_decodes_as_the_hub_layout_does(tmp_path: Path) -> None:
    torch.manual_seed(4)
    backbone = Dinov2Config(
        hidden_size=64, num_hidden_layers=12, num_attention_heads=1, image_size=518, patch_size=14,
        out_indices=[3, 6, 9, 12], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=64, neck_hidden_sizes=[4, 8, 12, 16],
        fusion_hidden_size=8, head_hidden_size=6,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if name.startswith("backbone") else 0.2))
        model.head.conv3.bias.fill_(1.0)  # above the last ReLU's threshold, else every map is zero
    file = tmp_path / "depth_anything_v2_toy.pth"
    model.save_pretrained(tmp_path / "hub")  # the file's names, which a loaded model need not keep
    tensors = original_naming(load_file(tmp_path / "hub" / "model.safetensors"), 12)
    torch.save(tensors, file)
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        expected = model(pixels).predicted_depth[0]
    assert expected.std() > 1e-3
    teacher = registry.load("depth", TeacherSettings(str(file)))
    decoder = load_decoder(teacher.fingerprint, str(file), "cpu")
    assert close(decoder.full(pixels[0].numpy()), expected)

    shutil.copy(GOLDEN / "depth" / "preprocessor_config.json", tmp_path / "hub")
    hub, plain = (
        registry.load("depth-map", TeacherSettings(str(path), options={"parts": 1}))
        for path in (tmp_path / "hub", file)
    )
    assert plain.fingerprint == hub.fingerprint
    cells = expected.reshape(24, 14, 24, 14).mean((1, 3))
    assert close(plain.encode(pixels)[0, ..., 0].numpy(), cells)
    metric = file.with_name("depth_anything_v2_metric_toy.pth")
    shutil.copy(file, metric)
    with pytest.raises(TeacherError, match="tells metric depth, and up to which distance does not stand in it"):
        registry.load("depth-map", TeacherSettings(str(metric)))

    torch.save({n: t for n, t in tensors.items() if n.startswith("pretrained.")}, file)
    with pytest.raises(TeacherError, match="has no depth head"):
        load_decoder(teacher.fingerprint, str(file), "cpu")


def test_a_stored_depth_map_is_laid_out_beside_the_whole_model_s(
    tmp_path: Path, depth_model: DepthAnythingForDepthEstimation
) -> None:
    teacher = registry.load("depth-map", TeacherSettings(str(GOLDEN / "depth"), options={"parts": 2}))
    store = store_of(tmp_path / "map.zarr", [teacher])
    with torch.no_grad():
        expected = depth_model(torch.from_numpy(pixels_of(teacher))[None]).predicted_depth[0].numpy()
    decoder = load_decoder(teacher.fingerprint, str(GOLDEN / "depth"), "cpu")
    full, decoded = decoder.full(pixels_of(teacher)), decoder.decode(stored(store, "depth-map"), None)
    np.testing.assert_allclose(full, expected, rtol=1e-4, atol=1e-6)
    blocks = expected.reshape(48, 7, 48, 7).mean((1, 3)).repeat(7, 0).repeat(7, 1)
    np.testing.assert_allclose(decoded, blocks, rtol=1e-4, atol=1e-6)
    assert decoder.agreement(full, decoded).startswith("correlation with the full teacher's depth 0.")
    shown = preview(store, KEY, PreviewSettings(images=IMAGES, checkpoints={"depth-map": str(GOLDEN / "depth")}))
    assert titles(shown)[0] == ["image", "depth-map: the full teacher", "depth-map: decoded from the store"]


def test_metres_are_drawn_with_what_is_near_bright(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "depth", tmp_path / "depth")
    config = json.loads((tmp_path / "depth" / "config.json").read_text())
    (tmp_path / "depth" / "config.json").write_text(
        json.dumps(config | {"depth_estimation_type": "metric", "max_depth": 20})
    )
    metric, relative = (
        load_decoder(
            registry.load("depth", TeacherSettings(str(folder / "depth"))).fingerprint, str(folder / "depth"), "cpu"
        )
        for folder in (tmp_path, GOLDEN)
    )
    distances = np.linspace(1, 9, 64, dtype=np.float32).reshape(8, 8)
    drawn = metric.draw(distances)
    assert drawn.caption == "bright is near; 1 to 9 (metres)"
    assert np.array_equal(drawn.rgb, relative.draw(-distances).rgb)


def test_a_checkpoint_with_the_neck_of_another_model_is_refused(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "depth", tmp_path / "depth")
    config = json.loads((tmp_path / "depth" / "config.json").read_text())
    (tmp_path / "depth" / "config.json").write_text(json.dumps(config | {"fusion_hidden_size": 16}))
    with pytest.raises(TeacherError, match=r"not those of .*: tensors 47 of another shape \(head\.conv1"):
        load_decoder(teachers["depth"].fingerprint, str(tmp_path / "depth"), "cpu")


# --- seg


@pytest.mark.parametrize("what", ["full", "decode"])
def test_the_panoptic_map_comes_from_the_logits_of_transformers(
    what: str,
    store: FeatureStore,
    seg_checkpoint: tuple[Path, list[int]],
    teachers: dict[str, Teacher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, ids = seg_checkpoint
    model = OneFormerForUniversalSegmentation.from_pretrained(folder).eval()
    pixels = pixels_of(teachers["seg"])
    feature = stored(store, "seg")
    encoder = model.model.pixel_level_module.encoder
    original = encoder.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        assert [tuple(m.shape[-2:]) for m in output.feature_maps] == [(200, 200), (100, 100), (50, 50), (25, 25)]
        resized = [torch.nn.functional.interpolate(m, (24, 24), mode="bilinear") for m in output.feature_maps[:3]]
        output.feature_maps = (*resized, torch.from_numpy(feature).permute(2, 0, 1)[None])
        return output

    if what == "decode":
        monkeypatch.setattr(encoder, "forward", replaced)
    task = torch.tensor([ids + [0] * (8 - len(ids))])
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)[None], task)

    seen: dict[str, Any] = {}

    def capture(classes: np.ndarray, masks: np.ndarray, *, fused: frozenset[int]) -> Panoptic:
        seen.update(classes=classes, masks=masks, fused=fused)
        return Panoptic(np.zeros((1, 1), int), np.zeros((1, 1), int), 1.0)

    monkeypatch.setattr(seg_module, "merge_queries", capture)
    decoder = load_decoder(teachers["seg"].fingerprint, str(folder), "cpu")
    decoder.full(pixels) if what == "full" else decoder.decode(feature, pixels)
    masks = torch.nn.functional.interpolate(expected.masks_queries_logits, (384, 384), mode="bilinear")[0]
    assert close(seen["classes"], expected.class_queries_logits[0])
    assert close(seen["masks"], masks)
    assert seen["fused"] == {3, 4}  # class3 and class4 are stuff in the checkpoint's list


def test_without_a_tokenizer_the_panoptic_map_is_unavailable(teachers: dict[str, Teacher]) -> None:
    with pytest.raises(Unavailable, match="has no tokenizer") as error:
        load_decoder(teachers["seg"].fingerprint, str(GOLDEN / "seg"), "cpu")
    assert "Copy the tokenizer's files" in error.value.remedy


def test_the_class_list_is_found_wherever_the_checkpoint_keeps_it(tmp_path: Path) -> None:
    from olapipe.teachers.checkpoint import Checkpoint

    folder = tmp_path / "seg"
    shutil.copytree(GOLDEN / "seg", folder)
    checkpoint = Checkpoint("seg", folder, "seg")
    (folder / "coco_panoptic.json").write_text(
        json.dumps({"0": {"name": "cat", "isthing": 1}, "1": {"name": "sky", "isthing": 0}})
    )
    classes = seg_module.read_classes(checkpoint, {})
    assert (classes.names, classes.stuff) == ({0: "cat", 1: "sky"}, {1})
    (folder / "coco_panoptic.json").unlink()
    classes = seg_module.read_classes(checkpoint, {})
    assert (classes.names[4], classes.stuff) == ("class4", {3, 4})
    (folder / "preprocessor_config.json").write_text('{"class_info_file": "../elsewhere.json"}')
    (tmp_path / "elsewhere.json").write_text("{}")
    classes = seg_module.read_classes(checkpoint, {0: "from config"})
    assert (classes.names, classes.things, classes.stuff) == ({0: "from config"}, None, frozenset())
    (folder / "preprocessor_config.json").write_text('{"metadata": {"0": "cat"}}')
    with pytest.raises(TeacherError, match="class list cannot be read"):
        seg_module.read_classes(checkpoint, {})


def logit(probability: np.ndarray | float) -> np.ndarray:
    return np.log(np.asarray(probability) / (1 - np.asarray(probability)))


def scores(*rows: tuple[int, float], classes: int = 3) -> np.ndarray:
    """Class logits of queries that give `label` the probability `p` and share the rest out evenly."""
    made = np.empty((len(rows), classes + 1))
    for row, (label, probability) in zip(made, rows, strict=True):
        row[:] = np.log((1 - probability) / classes)
        row[label] = np.log(probability)
    return made


def test_pixels_go_to_the_query_that_is_surest_of_them() -> None:
    masks = logit(np.array([[[0.9, 0.9, 0.6, 0.1]], [[0.1, 0.2, 0.9, 0.9]]]))
    merged = merge_queries(scores((0, 0.9), (1, 0.8)), masks, fused=set())
    # third pixel: 0.9 · 0.6 = 0.54 against 0.8 · 0.9 = 0.72; the first query wins 2 of its 3, below 0.8
    assert merged.labels.tolist() == [[NOTHING, NOTHING, 1, 1]]
    assert merged.best == pytest.approx(0.9)
    masks[0, 0, 2] = logit(0.4)
    assert merge_queries(scores((0, 0.9), (1, 0.8)), masks, fused=set()).labels.tolist() == [[0, 0, 1, 1]]


def test_unsure_queries_and_those_of_no_object_are_dropped() -> None:
    masks = np.full((3, 1, 2), logit(0.9))
    merged = merge_queries(scores((0, 0.5), (3, 0.99), (1, 0.3)), masks, fused=set())
    assert (merged.segments == NOTHING).all()
    assert merged.best == pytest.approx(0.5)


def test_a_pixel_below_half_in_its_own_mask_is_nothing() -> None:
    merged = merge_queries(scores((0, 0.9)), logit(np.array([[[0.9, 0.4]]])), fused=set())
    assert merged.labels.tolist() == [[0, NOTHING]]


def test_stuff_is_one_segment_and_things_are_counted_apart() -> None:
    masks = np.full((4, 1, 4), logit(0.01))
    masks[range(4), 0, range(4)] = logit(0.99)
    queries = scores((1, 0.9), (0, 0.9), (1, 0.9), (0, 0.9))
    merged = merge_queries(queries, masks, fused={1})
    assert merged.labels.tolist() == [[1, 0, 1, 0]]
    assert merged.segments.tolist() == [[0, 1, 0, 2]]  # a segment after a fused one gets a number of its own


def test_the_drawing_names_classes_and_says_where_there_is_nothing() -> None:
    labels = np.array([[1, 1, 1, NOTHING]])
    drawing = draw(Panoptic(np.where(labels == 1, 0, NOTHING), labels, 0.9), {1: "sky"})
    assert drawing.caption == "sky 75%; nothing 25%"
    assert tuple(drawing.rgb[0, -1]) == (40, 40, 40)
    assert tuple(drawing.rgb[0, 0]) != (40, 40, 40)
    empty = np.full((1, 1), NOTHING)
    assert (
        draw(Panoptic(empty, empty, 0.25), {}).caption
        == "no segment: the best score of any query is 0.25, above 0.5 counts"
    )


def test_agreement_counts_pixels_of_the_same_class() -> None:
    full = np.array([[0, 0, NOTHING, 2]])
    decoded = np.array([[0, 1, NOTHING, NOTHING]])
    decoder = object.__new__(seg_module.SegDecoder)
    text = decoder.agreement(Panoptic(full, full, 1.0), Panoptic(decoded, decoded, 1.0))
    assert text == "same class as the full teacher at 50.0% of the pixels (it sees none at 25.0%)"


# --- gen


def test_without_diffusers_the_drawing_is_unavailable(
    teachers: dict[str, Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="diffusers is not installed"):
        load_decoder(teachers["gen"].fingerprint, str(GOLDEN / "gen"), "cpu")


def test_an_image_encoder_alone_draws_nothing(teachers: dict[str, Teacher], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(Unavailable, match=r"has no image_normalizer/, .*unet/.* with the image encoder alone"):
        load_decoder(teachers["gen"].fingerprint, str(GOLDEN / "gen"), "cpu")


@pytest.mark.filterwarnings("default")  # of diffusers' own imports
def test_unclip_draws_the_same_image_from_the_same_embedding(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    from transformers import CLIPVisionModelWithProjection as Encoder

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    torch.manual_seed(5)
    text = CLIPTextConfig(
        hidden_size=32, projection_dim=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(32, 64), attention_head_dim=(2, 4),
        class_embed_type="projection", projection_class_embeddings_input_dim=64, cross_attention_dim=32,
        layers_per_block=1,
    )  # fmt: skip
    normalizer = importlib.import_module("diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer")
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessorPil(),
        image_encoder=Encoder.from_pretrained(GOLDEN / "gen" / "image_encoder"),
        image_normalizer=normalizer.StableUnCLIPImageNormalizer(embedding_dim=32),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        vae=diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
    )
    pipeline.save_pretrained(tmp_path / "gen")
    decoder = load_decoder(teachers["gen"].fingerprint, str(tmp_path / "gen"), "cpu")
    pixels = pixels_of(teachers["gen"])
    embedding = teachers["gen"].encode(torch.from_numpy(pixels)[None])[0]
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(prompt="", image_embeds=embedding[None], num_inference_steps=20, generator=generator).images[0]
    expected = np.asarray(drawn)
    torch.manual_seed(99)  # the seed is the decoder's own
    assert np.array_equal(decoder.decode(embedding.numpy(), None), expected)
    assert np.abs(decoder.full(pixels).astype(int) - expected).max() <= 1
    other = decoder.decode(-embedding.numpy(), None)
    assert not np.array_equal(other, expected)
    assert decoder.agreement(expected, other).startswith("differs from the drawing of the image's own embedding by ")


# --- colours


def test_pca_gives_equal_features_equal_colours_in_every_map() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(6, 5, 8)).astype(np.float32)
    colours = PcaColours(reference)
    assert np.array_equal(colours(reference[::-1]), colours(reference)[::-1])
    assert colours(reference[:2, :3]).shape == (2, 3, 3)


def test_the_first_component_follows_the_direction_of_most_variance() -> None:
    # one channel in steps of 1, one in steps of 0.01: red must carry the first, rising with its positive loading
    grid = np.zeros((10, 10, 4), dtype=np.float32)
    grid[..., 2] = np.arange(10)[:, None]
    grid[..., 1] = 0.01 * np.arange(10)[None, :]
    rgb = PcaColours(grid)(grid).astype(int)
    assert (np.diff(rgb[1:-1, 0, 0]) > 0).all()
    assert (np.ptp(rgb[..., 0], axis=1) == 0).all()
    assert (np.diff(rgb[0, 1:-1, 1]) > 0).all()
    assert (rgb[..., 2] == 128).all()  # nothing is left for the third


def test_a_constant_map_is_grey_and_fewer_channels_than_colours_are_no_error() -> None:
    assert (PcaColours(np.ones((3, 3, 5)))(np.ones((3, 3, 5))) == 128).all()
    assert PcaColours(np.random.default_rng(0).normal(size=(3, 3, 2)))(np.zeros((3, 3, 2))).shape == (3, 3, 3)


def test_heat_rises_in_luminance_and_takes_a_constant_map() -> None:
    luminance = heat(np.linspace(3, 9, 20)[None]).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance[0]) > 0).all()
    assert (heat(np.ones((2, 2))) == heat(np.ones((2, 2)))[0, 0]).all()


def test_bars_show_each_channel_and_lose_none_where_there_are_more_than_pixels() -> None:
    rgb = strip(np.array([1.0, -1.0]), reach=1.0)
    assert tuple(rgb[1, 0]) != tuple(rgb[-2, 0])
    assert tuple(rgb[-2, -1]) != tuple(rgb[1, -1])
    many = np.zeros(5000)
    many[1234] = 1.0
    assert (strip(many, reach=1.0)[1] != 245).any()


# --- the page


def titles(page: page_module.Page) -> list[list[str]]:
    return [[cell.title for cell in row if cell] for row in page.rows]


def test_a_page_shows_image_full_teacher_store_and_prediction_side_by_side(
    store: FeatureStore, teachers: dict[str, Teacher], seg_checkpoint: tuple[Path, list[int]], tmp_path: Path
) -> None:
    predictions = store_of(
        tmp_path / "p.zarr", [teachers["depth"], teachers["seg"]], noise=0.2, source="predictions of toy"
    )
    checkpoints = {"depth": str(GOLDEN / "depth"), "seg": str(seg_checkpoint[0])}
    shown = preview(store, KEY, PreviewSettings(images=IMAGES, checkpoints=checkpoints), predictions)
    assert titles(shown) == [
        ["image", "depth: the full teacher", "depth: decoded from the store", "depth: decoded from the prediction"],
        ["depth", "depth: features computed now", "depth: features in the store", "depth: features predicted"],
        ["image", "gen: features in the store"],
        [
            "image", "seg: the full teacher", "seg: decoded from the store", "seg: decoded from the prediction",
            "seg: the store's mean in its place",
        ],
        ["seg", "seg: features computed now", "seg: features in the store", "seg: features predicted"],
    ]  # fmt: skip
    text = "\n".join(shown.lines)
    assert "gen: not decoded; add --checkpoint gen=FOLDER (gen)" in text
    assert f"gen: {predictions.root} holds no predictions of it." in text
    (live,) = [line for line in shown.lines if line.startswith("depth: stored against computed now")]
    assert float(live.split("L2 ")[1].split()[0]) < BOUND
    (predicted,) = [line for line in shown.lines if line.startswith("depth: prediction against stored")]
    feature = stored(store, "depth")
    error = np.linalg.norm(stored(predictions, "depth") - feature) / np.linalg.norm(feature)
    both = np.stack([stored(store, "depth", file.name) for file in FILES])
    floor = np.linalg.norm(both.mean(axis=(0, 1, 2)) - feature) / np.linalg.norm(feature)
    assert f"relative L2 {error:.3f}; the store's mean feature alone: {floor:.3f}" in predicted
    pca = shown.rows[1][2]
    assert pca is not None and np.array_equal(pca.rgb, PcaColours(feature)(feature))
    decoded = shown.rows[0][2]
    depth = load_decoder(teachers["depth"].fingerprint, checkpoints["depth"], "cpu").decode(feature, None)
    assert decoded is not None and np.array_equal(decoded.rgb, heat(depth))
    with Image.open(IMAGES / KEY) as image:
        width, height = image.size
    assert decoded.aspect == width / height

    shown.save(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size[0] == 5 * 320 + 6 * 16
        assert len(picture.getcolors(1 << 24) or []) > 1000
    with pytest.raises(OlaError, match="cannot be written") as failed:
        shown.save(tmp_path / "nowhere" / "page.png")
    assert "folder that exists" in failed.value.remedy


def test_a_store_of_predictions_is_shown_by_itself(teachers: dict[str, Teacher], tmp_path: Path) -> None:
    predictions = store_of(tmp_path / "p.zarr", [teachers["depth"]], noise=0.2, source="predictions of toy")
    shown = preview(predictions, KEY, PreviewSettings(checkpoints={"depth": str(GOLDEN / "depth")}))
    assert titles(shown) == [["depth", "depth: decoded from the store"], ["depth", "depth: features in the store"]]
    assert "predictions of toy" in shown.rows[1][0].caption  # type: ignore[union-attr]


def test_without_image_and_checkpoint_there_are_colours_and_reasons(
    store: FeatureStore, seg_checkpoint: tuple[Path, list[int]]
) -> None:
    shown = preview(store, KEY, PreviewSettings(checkpoints={"seg": str(seg_checkpoint[0])}))
    assert titles(shown) == [[name, f"{name}: features in the store"] for name in ("depth", "gen", "seg")]
    assert shown.lines == [
        "No --images folder: the image and what the full teacher says of it are not shown.",
        "depth: not decoded; add --checkpoint depth=FOLDER (depth)",
        "gen: not decoded; add --checkpoint gen=FOLDER (gen)",
        "seg: not decoded: its decoder also reads the image; add --images FOLDER",
    ]


def test_what_a_decoder_lacks_is_said_and_its_colours_are_shown(store: FeatureStore) -> None:
    settings = PreviewSettings(images=IMAGES, checkpoints={"seg": str(GOLDEN / "seg")}, teachers=["seg"])
    shown = preview(store, KEY, settings)
    assert titles(shown) == [["image", "seg: features computed now", "seg: features in the store"]]
    assert "has no tokenizer" in shown.lines[0]


def test_another_checkpoint_is_refused_with_both_digests(store: FeatureStore, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = DepthAnythingForDepthEstimation.from_pretrained(GOLDEN / "depth")
    with torch.no_grad():
        other.backbone.encoder.layer[0].mlp.fc1.bias[0] += 1e-3
    other.save_pretrained(tmp_path / "depth")
    shutil.copy(GOLDEN / "depth" / "preprocessor_config.json", tmp_path / "depth")
    found = registry.load("depth", TeacherSettings(str(tmp_path / "depth"))).fingerprint.weights
    promised = store.teacher("depth").fingerprint.weights
    with pytest.raises(FingerprintError) as error:
        preview(store, KEY, PreviewSettings(checkpoints={"depth": str(tmp_path / "depth")}))
    assert found != promised and found in error.value.problem and promised in error.value.problem
    assert "--checkpoint depth=" in error.value.remedy


def test_a_checkpoint_that_preprocesses_differently_is_refused_by_field(store: FeatureStore, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "gen", tmp_path / "gen")
    path = tmp_path / "gen" / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resample": 2}))
    with pytest.raises(FingerprintError, match=r"preprocessing\.steps"):
        preview(store, KEY, PreviewSettings(checkpoints={"gen": str(tmp_path / "gen")}))


def test_the_teacher_is_loaded_with_the_settings_of_the_store(tmp_path: Path) -> None:
    options = {"pooling": "last", "exif": False, "channel_order": "rgb"}
    settings = TeacherSettings(str(GOLDEN / "depth"), preset="ola-vlm", options=options)
    store = store_of(tmp_path / "s.zarr", [registry.load("depth", settings)])
    shown = preview(store, KEY, PreviewSettings(images=IMAGES, checkpoints={"depth": str(GOLDEN / "depth")}))
    (live,) = [line for line in shown.lines if "stored against computed now" in line]
    assert float(live.split("L2 ")[1].split()[0]) < BOUND


def test_features_on_another_grid_are_decoded_on_the_teachers_own(
    tmp_path: Path, depth_model: DepthAnythingForDepthEstimation
) -> None:
    settings = TeacherSettings(str(GOLDEN / "depth"), options={"grid": "12x8", "grid_resize": "area"})
    store = store_of(tmp_path / "s.zarr", [registry.load("depth", settings)])
    shown = preview(store, KEY, PreviewSettings(images=IMAGES, checkpoints={"depth": str(GOLDEN / "depth")}))
    (live,) = [line for line in shown.lines if "stored against computed now" in line]
    assert float(live.split("L2 ")[1].split()[0]) < BOUND
    assert "depth: decoded after resizing back to 24x24, bilinearly" in shown.lines
    feature = torch.from_numpy(stored(store, "depth")).permute(2, 0, 1)[None]
    assert feature.shape == (1, 48, 12, 8)
    resized = torch.nn.functional.interpolate(feature, (24, 24), mode="bilinear").flatten(2).transpose(1, 2)
    tokens = torch.cat((resized[:, :1], resized), dim=1)
    with torch.no_grad():
        expected = depth_model.head(depth_model.neck([tokens] * 4, 24, 24), 24, 24)[0].numpy()
    decoded = shown.rows[0][2]
    assert decoded is not None and decoded.rgb is not None
    assert np.abs(decoded.rgb.astype(int) - heat(expected)).max() <= 1


def test_features_that_lost_their_norms_are_shown_in_colours(tmp_path: Path) -> None:
    settings = TeacherSettings(str(GOLDEN / "depth"), options={"l2_norm": True})
    store = store_of(tmp_path / "s.zarr", [registry.load("depth", settings)])
    shown = preview(store, KEY, PreviewSettings(images=IMAGES, checkpoints={"depth": str(GOLDEN / "depth")}))
    assert titles(shown) == [["image", "depth: features computed now", "depth: features in the store"]]
    assert "divided by their norms" in shown.lines[0]


def test_predictions_of_another_feature_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    settings = TeacherSettings(str(GOLDEN / "depth"), options={"pooling": "last"})
    other = store_of(tmp_path / "p.zarr", [registry.load("depth", settings)])
    with pytest.raises(FingerprintError, match=r"pooling: 'mean' .in the store. against 'last' .in the predictions."):
        preview(store, KEY, PreviewSettings(teachers=["depth"]), other)


def test_an_unknown_key_is_refused_with_the_nearest_one(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"has no image 'cofee\.png'") as error:
        preview(store, "cofee.png", PreviewSettings())
    assert error.value.remedy == "Did you mean 'coffee.png'?"
    with pytest.raises(StoreError) as error:
        preview(store, "train/coffee.png", PreviewSettings())
    assert error.value.remedy == "Did you mean 'coffee.png'?"
    with pytest.raises(StoreError) as error:
        preview(store, "zzz", PreviewSettings())
    assert "astronaut.png, coffee.png" in error.value.remedy
    assert find_sample(store, f"./{KEY}").key == KEY


def test_a_failed_row_is_refused_with_its_reason(tmp_path: Path) -> None:
    store, teacher, _ = make_store(tmp_path / "s.zarr", count=5, rows_per_shard=4)
    fill = np.ones((4, *teacher.fingerprint.shape), np.float32)
    second = record(teacher="other")
    store.put_teacher(second)
    fill_shard(store, second, 0, fill, failed=(1,))
    shown = preview(store, "0001.jpg", PreviewSettings())
    assert titles(shown) == [["depth", "depth: features in the store"]]
    assert "0001.jpg has no other feature: truncated: cut short" in shown.lines[0]
    with pytest.raises(StoreError, match=r"0001\.jpg has no other feature: truncated: cut short"):
        preview(store, "0001.jpg", PreviewSettings(teachers=["other"]))
    with pytest.raises(StoreError, match=r"0004\.jpg has no other feature yet: its shard is not extracted"):
        preview(store, "0004.jpg", PreviewSettings(teachers=["other"]))


def test_a_checkpoint_for_a_teacher_that_is_not_shown_is_refused(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match="has no features of the teacher 'dino'"):
        preview(store, KEY, PreviewSettings(checkpoints={"dino": "x"}))
    with pytest.raises(StoreError, match="gen is not among the teachers shown"):
        preview(store, KEY, PreviewSettings(checkpoints={"gen": "x"}, teachers=["depth"]))


def test_another_image_under_the_same_name_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    data = bytearray((IMAGES / KEY).read_bytes())
    data[-20] ^= 1
    (tmp_path / KEY).write_bytes(data)
    settings = PreviewSettings(images=tmp_path)
    with pytest.raises(ImageError, match="is not the image that was extracted") as error:
        preview(store, KEY, settings)
    assert error.value.reason == "changed"
    (tmp_path / KEY).unlink()
    with pytest.raises(ImageError, match=rf"{KEY}: there is no such file"):
        preview(store, KEY, settings)
    with pytest.raises(OlaError, match="no such folder"):
        preview(store, KEY, replace(settings, images=tmp_path / "nowhere"))


def test_a_teacher_without_a_decoder_is_shown_in_colours(teachers: dict[str, Teacher]) -> None:
    other = teachers["depth"].fingerprint.model_copy(update={"teacher": "dinov2"})
    with pytest.raises(Unavailable, match="no decoder for this feature"):
        load_decoder(other, "x", "cpu")
    assert depth_module.DepthDecoder.needs_pixels is False
