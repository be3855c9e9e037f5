"""Every bad input ends as a named failure with the job going on, or as one clear error with its remedy."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from pipeline_support import (
    DEPTH,
    GOLDEN,
    depth_arguments,
    image_bytes,
    olapipe,
    pixels,
    ray_session,
    start_olapipe,
    write_images,
)
from typer.testing import Result

from olaschema.store import FeatureStore

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]

SIZE = (60, 45)


def _png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims a size; its checksum is right."""
    data = bytearray(image_bytes(0, SIZE))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _write_corpus(folder: Path) -> None:
    """Good images beside bad ones; NAME-by-hand.png is what NAME should have been decoded to."""
    write_images(folder, "good.png", size=SIZE)
    (folder / "truncated.jpg").write_bytes(image_bytes(1, (200, 150), "JPEG")[:1500])
    (folder / "huge.png").write_bytes(_png_claiming(20_000, 10_000))
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(image_bytes(2, SIZE))
    (folder / "[red]x[").mkdir()
    (folder / "[red]x[" / "red].jpg").write_bytes(b"markup in a broken image's name")
    (folder / "[bold]good[").mkdir()
    (folder / "[bold]good[" / "bold].png").write_bytes(image_bytes(3, SIZE))
    (folder / "esc\x1b[31m.png").write_bytes(b"control characters in the name")

    rgb = Image.fromarray(pixels(4, SIZE))
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    with Image.open(folder / "cmyk.jpg") as cmyk:
        ink = np.asarray(cmyk, dtype=np.float64)
        by_hand = np.rint((255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255)
        Image.fromarray(by_hand.astype(np.uint8)).save(folder / "cmyk-by-hand.png")

    grey = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype(np.uint16)
    Image.fromarray(grey).save(folder / "sixteen.png")
    Image.fromarray(np.rint(grey / 257.0).astype(np.uint8)).save(folder / "sixteen-by-hand.png")

    palette = rgb.quantize(16)
    palette.save(folder / "palette.png", transparency=bytes(range(0, 256, 16)))
    colours = np.asarray(palette.getpalette("RGB")).reshape(-1, 3)[np.asarray(palette)]
    alpha = np.arange(0, 256, 16)[np.asarray(palette)][..., None] / 255
    Image.fromarray(np.rint(colours * alpha + 255 * (1 - alpha)).astype(np.uint8)).save(folder / "palette-by-hand.png")

    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    rgb.save(folder / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels(4, SIZE), k=-1)).save(folder / "turned-by-hand.png")
    rgb.save(folder / "turned-as-stored.png")

    frames = [Image.fromarray(pixels(seed, SIZE)).quantize(64) for seed in (5, 6)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:], duration=50)
    frames[0].convert("RGB").save(folder / "animated-by-hand.png")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    _write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("out") / "s"
    return olapipe(*depth_arguments(corpus, out, "--shard-size", 8, "--workers", 1)), out


def _features(out: Path) -> dict[str, np.ndarray]:
    values = zarr.open_group(out, mode="r")["depth/values"]
    return {sample.key: values[sample.row].astype(np.float32) for sample in FeatureStore.open(out).samples()}


def test_the_job_goes_on_and_names_each_failure(run: tuple[Result, Path]) -> None:
    result, out = run
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    found = json.loads(olapipe("inspect", out, "--json").stdout)["teachers"]["depth"]
    assert {failure["key"]: failure["reason"] for failure in found["failures"]} == {
        "truncated.jpg": "truncated",
        "huge.png": "too-large",
        "text.jpg": "not-an-image",
        "empty.png": "empty",
        "dangling.png": "missing",
        "./caf\\xe9.png": "bad-name",
        "[red]x[/red].jpg": "not-an-image",
        "esc\x1b[31m.png": "not-an-image",
    }
    assert found["images"]["ok"] == found["images"]["planned"] - 8
    shown = result.stdout
    for words in ("truncated.jpg", "200 megapixels", "the limit is 100", "text.jpg: not an image", "caf\\xe9.png"):
        assert words in shown
    assert "[red]x[/red].jpg" in shown, "markup in a name is shown, not obeyed"
    assert "esc\\x1b[31m.png" in shown and "\x1b[31m" not in shown


@pytest.mark.parametrize("name", ["cmyk.jpg", "sixteen.png", "palette.png", "turned.png", "animated.gif"])
def test_unusual_images_are_converted_properly(run: tuple[Result, Path], name: str) -> None:
    features = _features(run[1])
    by_hand = features[f"{name.partition('.')[0]}-by-hand.png"]
    # one grey level of rounding somewhere in the picture moves features by about this much
    np.testing.assert_allclose(features[name], by_hand, atol=0.02)
    other = features["good.png"]
    assert np.abs(other - by_hand).max() > 0.1, "the comparison can tell images apart"


def test_rotation_is_applied_but_not_by_the_published_preset(
    run: tuple[Result, Path], corpus: Path, tmp_path: Path
) -> None:
    features = _features(run[1])
    assert np.abs(features["turned.png"] - features["turned-as-stored.png"]).max() > 0.1
    few = tmp_path / "c"
    few.mkdir()
    for name in ("turned.png", "turned-as-stored.png"):
        shutil.copy(corpus / name, few)
    out = tmp_path / "s"
    assert olapipe(*depth_arguments(few, out, "--preset", "ola-vlm", "--workers", 1)).exit_code == 0
    published = _features(out)
    np.testing.assert_allclose(published["turned.png"], published["turned-as-stored.png"], atol=1e-3)


def test_conversations_naming_what_is_not_there(tmp_path: Path) -> None:
    write_images(tmp_path / "i", "good.png", size=SIZE)
    write_images(tmp_path, "outside.png", size=SIZE)
    (tmp_path / "i" / "folder.jpg").mkdir()
    names = ["good.png", "missing.png", "../outside.png", "/etc/hostname.png", "folder.jpg", "./good.png"]
    (tmp_path / "c.json").write_text(json.dumps([{"image": name, "conversations": []} for name in names]))
    out = tmp_path / "s"
    result = olapipe(*depth_arguments(tmp_path / "c.json", out, "--images", tmp_path / "i", "--workers", 1))
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    assert "repeated uses: 1" in result.stderr
    found = json.loads(olapipe("inspect", out, "--json").stdout)["teachers"]["depth"]
    assert [(f["key"].partition("#")[0], f["reason"]) for f in found["failures"]] == [
        ("missing.png", "missing"),
        ("../outside.png", "outside-root"),
        ("/…/hostname.png", "outside-root"),
        ("folder.jpg", "unreadable"),
    ]
    assert found["images"]["ok"] == 1


def _refused(result: Result, *words: str, code: int) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("error: ") == 1
    remedy = result.stderr.rpartition("error: ")[2].strip().splitlines()
    assert len(remedy) >= 2, "an error has a remedy"
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("case", ["missing", "empty", "no list", "no json", "no images", "text"])
def test_a_corpus_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.json").write_text({"no list": "{}", "no json": "[{"}.get(case, '[{"image": "a.png"}]'))
    (tmp_path / "c.txt").write_text("a.png")
    corpus, words = {
        "missing": ("none", "no such file or folder"),
        "empty": ("empty", "no image in this folder"),
        "no list": ("c.json", "not a list"),
        "no json": ("c.json", "is not JSON"),
        "no images": ("c.json", "folder of its images is not given"),
        "text": ("c.txt", "neither a folder nor"),
    }[case]
    more = ["--images", tmp_path] if case in ("no list", "no json") else []
    _refused(olapipe(*depth_arguments(tmp_path / corpus, tmp_path / "s", *more)), words, corpus, code=2)
    assert not (tmp_path / "s").exists()


def test_unknown_teachers_and_settings(tmp_path: Path) -> None:
    write_images(tmp_path / "c", "a.png")
    base = ["extract", tmp_path / "c", "--out", tmp_path / "s"]
    _refused(olapipe(*base, "--teacher", "dpeth"), "'dpeth'", "'depth'", code=2)
    _refused(olapipe(*base), "teachers is missing", code=2)
    good = [*base, "--teacher", "depth"]
    _refused(olapipe(*good, "--checkpoint", "depth"), "TEACHER=PATH_OR_ID", code=2)
    _refused(olapipe(*good, "--checkpoint", "seg=x"), "not among the teachers", code=2)
    _refused(olapipe(*good, "--precision", "int2"), "precision", "float16", code=2)
    _refused(olapipe(*good, "--batch-size", "0"), "batch_size", code=2)
    _refused(olapipe(*good, "--set", "max_megapixel=3"), "did you mean max_megapixels?", code=2)
    _refused(olapipe(*good, "--teacher", "depth"), "named twice", code=2)
    _refused(olapipe(*good, "--config", tmp_path / "none.yaml"), "none.yaml", code=2)
    assert not (tmp_path / "s").exists()


def test_a_checkpoint_of_the_wrong_model_or_place(tmp_path: Path) -> None:
    write_images(tmp_path / "c", "a.png")
    base = ["extract", tmp_path / "c", "--out", tmp_path / "s", "--teacher", "depth", "--workers", "1"]
    _refused(olapipe(*base, "--checkpoint", f"depth={GOLDEN / 'seg'}"), "oneformer", "depth_anything", code=2)
    _refused(olapipe(*base, "--checkpoint", f"depth={tmp_path / 'none'}"), str(tmp_path / "none"), code=2)
    # nothing is in the way of the right command
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["_log"]


def test_a_checkpoint_that_is_not_there_is_refused_before_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("olapipe.extract.worker_pool", lambda *_: pytest.fail("workers were started"))
    write_images(tmp_path / "c", "a.png")
    base = ["extract", tmp_path / "c", "--out", tmp_path / "s", "--teacher", "depth"]
    _refused(olapipe(*base, "--checkpoint", f"depth={tmp_path / 'none'}"), str(tmp_path / "none"), code=2)
    assert not (tmp_path / "s").exists()


def test_workers_and_clusters_that_are_not_there(tmp_path: Path) -> None:
    write_images(tmp_path / "c", "a.png")
    arguments = depth_arguments(tmp_path / "c", tmp_path / "s")
    _refused(olapipe(*arguments, "--workers", 10_000), "10000 workers", code=2)
    started = time.monotonic()
    process = start_olapipe(*arguments, "--address", "127.0.0.1:1")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "no Ray cluster can be joined at 127.0.0.1:1" in output and "Traceback" not in output
    assert time.monotonic() - started < 90, "Ray itself would try for minutes"


def test_a_store_made_by_other_settings(run: tuple[Result, Path], corpus: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, out = run
    arguments = depth_arguments(corpus, out)
    _refused(olapipe(*arguments, "--precision", "float32"), "stored as float16", code=1)
    _refused(olapipe(*arguments, "--shard-size", 4), "8 rows per shard, 4 were asked for", code=1)
    _refused(olapipe(*arguments, "--preset", "ola-vlm"), "differ in meaning", "channel_order", code=1)
    _refused(olapipe(*arguments, "--set", "options.depth.pooling=last"), "pooling", "taps", code=1)
    other = shutil.copytree(DEPTH, tmp_path / "depth")
    tensors = load_file(other / "model.safetensors")
    tensors["backbone.layernorm.weight"] = tensors["backbone.layernorm.weight"] * 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    changed = ["extract", corpus, "--out", out, "--teacher", "depth", "--checkpoint", f"depth={other}"]
    _refused(olapipe(*changed), "differ in meaning", "weights", code=1)


def test_an_image_that_changed_after_it_was_planned_is_a_named_failure(tmp_path: Path) -> None:
    write_images(tmp_path / "c", "a.png", "b.png", size=SIZE)
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=4)
    from olapipe.corpus import list_corpus

    store.add_generation(entry.sample() for entry in list_corpus(tmp_path / "c", None).entries)
    (tmp_path / "c" / "b.png").write_bytes(image_bytes(9, (80, 80)))
    result = olapipe(*depth_arguments(tmp_path / "c", tmp_path / "s"))
    assert result.exit_code == 0, result.output
    assert "changed: 1" in result.stdout and "b.png" in result.stdout


@pytest.mark.parametrize("case", ["file", "under a file", "other folder", "proc", "other zarr"])
def test_an_output_that_cannot_be_one(tmp_path: Path, case: str) -> None:
    write_images(tmp_path / "c", "a.png")
    (tmp_path / "file").write_text("x")
    zarr.create_group(tmp_path / "zarr")
    out, words = {
        "file": (tmp_path / "file", "exists and is not a feature store"),
        "under a file": (tmp_path / "file" / "s", "cannot be written"),
        "other folder": (tmp_path / "c", "exists and is not a feature store"),
        "proc": (Path("/proc/none/s"), "cannot be written"),
        "other zarr": (tmp_path / "zarr", "not a feature store of ours"),
    }[case]
    _refused(olapipe(*depth_arguments(tmp_path / "c", out)), words, code=1)


def test_buckets_are_not_taken_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "c", "a.png")
    base = ["extract", "--teacher", "depth"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    _refused(olapipe(*base, "c", "--out", "s3://bucket/s"), "s3://bucket/s", code=1)
    _refused(olapipe(*base, "s3://bucket/c", "--out", "s"), "s3://bucket/c", code=2)
    _refused(olapipe("inspect", "s3://bucket/s"), "s3://bucket/s", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_job_and_the_rerun_goes_on(small_disk: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "c", "a.png", "b.png", "d.png", size=SIZE)
    out = small_disk / "s"
    arguments = depth_arguments(tmp_path / "c", out, "--shard-size", 1, "--workers", 1)
    _refused(olapipe(*arguments), "No space left on device", "finished shards are kept", code=1)
    kept = FeatureStore.open(out).committed("depth")
    assert 0 < len(kept) < 3
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    assert olapipe(*arguments).exit_code == 0
    assert FeatureStore.open(out).committed("depth") == [0, 1, 2]


def test_no_usable_image_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").write_bytes(b"")
    result = olapipe(*depth_arguments(tmp_path / "c", tmp_path / "s", "--workers", 1))
    assert result.exit_code == 1
    assert "empty: 1" in result.stdout
    assert "Traceback" not in result.output


def test_a_gpu_that_is_not_there_and_a_limit_that_is_none(tmp_path: Path) -> None:
    write_images(tmp_path / "c", "a.png")
    arguments = depth_arguments(tmp_path / "c", tmp_path / "s")
    if not torch.cuda.is_available():
        _refused(olapipe(*arguments, "--device", "cuda"), "no GPU", "--device cpu", code=2)
    _refused(olapipe(*arguments, "--max-megapixels", "inf"), "max_megapixels", code=2)
