"""The command `extract` from images to a store that plain zarr reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from pipeline_support import DEPTH, GOLDEN, depth_arguments, digests, olapipe, ray_session, write_images
from safetensors.torch import load_file, save_file
from worker_support import own_workers

from olaschema.store import FeatureStore

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]

NAMES = ("a.png", "b.jpg", "sub/c.png", "sub/d.jpg", "e.png", "f.png", "g.png")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder, *NAMES, size=(60, 45))
    return folder


@pytest.fixture(scope="module")
def store(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by one worker."""
    out = tmp_path_factory.mktemp("one") / "s"
    arguments = depth_arguments(corpus, out, "--shard-size", 2, "--batch-size", 2, "--workers", 1)
    with own_workers():
        result = olapipe(*arguments)
    assert result.exit_code == 0, result.output
    assert "depth" in result.stdout
    return out


def _independent_depth(path: Path) -> np.ndarray:
    """Depth Anything V2's mean of taps by transformers alone, `(24, 24, C)`: nothing of ours is used."""
    from transformers import DepthAnythingForDepthEstimation

    model = DepthAnythingForDepthEstimation.from_pretrained(DEPTH).eval()
    settings = json.loads((DEPTH / "preprocessor_config.json").read_text())
    with Image.open(path) as opened:
        squashed = opened.convert("RGB").resize((336, 336), Image.Resampling.BICUBIC)
    pixels = np.asarray(squashed, dtype=np.float32) / 255
    pixels = (pixels - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    with torch.inference_mode():
        maps = model.backbone(torch.from_numpy(pixels.transpose(2, 0, 1))[None].float()).feature_maps
    tokens = torch.stack([tap[0, 1:] for tap in maps]).mean(0)
    return tokens.reshape(24, 24, -1).numpy()


def test_plain_zarr_reads_what_transformers_computes(corpus: Path, store: Path) -> None:
    import pyarrow.parquet as pq

    values = zarr.open_group(store, mode="r")["depth/values"]
    table = pq.read_table(store / "samples/0000-00000.parquet").to_pylist()
    rows = {entry["key"]: entry["row"] for entry in table}
    assert list(rows) == ["a.png", "b.jpg", "e.png", "f.png", "g.png", "sub/c.png", "sub/d.jpg"]
    assert values.shape == (8, 24, 24, 48)
    for key in ("a.png", "sub/d.jpg"):
        expected = _independent_depth(corpus / key)
        stored = values[rows[key]].astype(np.float32)
        # half a unit in the last place of float16, and 1e-5 for float32 sums in another order
        np.testing.assert_allclose(stored, expected, rtol=2**-11, atol=2e-5)
    assert np.isnan(values[7]).all()


def test_two_workers_write_the_same_bytes(corpus: Path, store: Path, tmp_path: Path) -> None:
    shares = []
    for attempt in range(4):  # one worker may finish all four shards before the other has loaded its teacher
        out = tmp_path / str(attempt)
        arguments = depth_arguments(corpus, out, "--shard-size", 2, "--batch-size", 2, "--workers", 2)
        with own_workers():
            assert olapipe(*arguments).exit_code == 0
        assert digests(out) == digests(store)
        log = [json.loads(line) for line in (out / "_log/timings.jsonl").read_text().splitlines()]
        assert sorted(line["shard"] for line in log) == [0, 1, 2, 3]
        shares.append(len({line["pid"] for line in log}))
        if shares[-1] == 2:
            break
    assert shares[-1] == 2, "both workers had a share"


def test_a_rerun_with_nothing_to_do_starts_no_job(corpus: Path, store: Path) -> None:
    before = digests(store)
    heavy = "{'ray', 'torch', 'transformers'} & set(sys.modules)"
    last = f"print('imported:', *{heavy}, file=sys.stderr)"
    program = f"import sys\nfrom olapipe.cli import app\ntry: app()\nfinally: {last}"
    command = [sys.executable, "-c", program, *depth_arguments(corpus, store, "--batch-size", 2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "nothing to extract" in done.stderr
    assert done.stderr.splitlines()[-1].split() == ["imported:"]
    assert "depth" in done.stdout
    assert digests(store) == before


def test_a_rerun_with_nothing_to_do_refuses_another_checkpoint(
    corpus: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olapipe import extract, remembered

    monkeypatch.setattr(extract, "worker_pool", None)  # no job is started
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", 0.0)
    out, checkpoint = shutil.copytree(store, tmp_path / "s"), shutil.copytree(DEPTH, tmp_path / "depth")
    arguments = ["extract", corpus, "--out", out, "--teacher", "depth", "--checkpoint", f"depth={checkpoint}"]
    assert "loading depth" in olapipe(*arguments).stderr, "the files are copies, which nothing is known of"
    assert "settings are those of the last run" in olapipe(*arguments).stderr
    refused = olapipe(*arguments, "--set", "options.depth.exif=false")
    assert "loading depth" in refused.stderr and "exif" in refused.stderr
    assert refused.exit_code == 1
    weights = checkpoint / "model.safetensors"
    stat, tensors = weights.stat(), load_file(weights)
    next(tensor for name, tensor in tensors.items() if name.startswith("backbone.")).view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == stat.st_size
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync and cp -p leave it
    refused = olapipe(*arguments)
    assert "weights" in refused.stderr
    assert refused.exit_code == 1


def _copies(corpus: Path, store: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A corpus and its complete store that a test may change."""
    return shutil.copytree(corpus, tmp_path / "c"), shutil.copytree(store, tmp_path / "s")


def test_growth_adds_rows_and_touches_nothing_else(corpus: Path, store: Path, tmp_path: Path) -> None:
    folder, out = _copies(corpus, store, tmp_path)
    before = digests(out)
    values = zarr.open_group(out, mode="r")["depth/values"][:]
    write_images(folder, "A.png", size=(50, 40))  # sorts first, is planned last
    (folder / "f.png").unlink()
    result = olapipe(*depth_arguments(folder, out))
    assert result.exit_code == 0, result.output
    assert "new: 1" in result.stderr and "no longer in the corpus" in result.stderr
    after = digests(out)
    assert {name for name in before if after[name] != before[name]} == {"depth/values/zarr.json", "manifest.json"}
    grown = zarr.open_group(out, mode="r")["depth/values"]
    assert grown.shape[0] == 10
    np.testing.assert_array_equal(grown[:8], values)
    expected = _independent_depth(folder / "A.png")
    np.testing.assert_allclose(grown[8].astype(np.float32), expected, rtol=2**-11, atol=2e-5)


def test_failed_images_are_tried_again_when_asked(corpus: Path, store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    good = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(b"\0" * len(good))
    arguments = depth_arguments(folder, tmp_path / "s", "--shard-size", 2, "--batch-size", 2, "--workers", 1)
    result = olapipe(*arguments)
    assert result.exit_code == 0, "one failed image is no failed run"
    assert "not-an-image: 1" in result.stdout and "b.jpg" in result.stdout
    (folder / "b.jpg").write_bytes(good)
    assert "not-an-image: 1" in olapipe(*arguments).stdout, "not tried again unasked"
    result = olapipe(*arguments, "--retry-failed")
    assert result.exit_code == 0
    assert "not-an-image" not in result.stdout
    assert digests(tmp_path / "s") == digests(store)


def test_a_mended_image_of_another_size_is_taken_when_asked(corpus: Path, store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    good = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(good[: len(good) // 2])
    arguments = depth_arguments(folder, tmp_path / "s", "--shard-size", 2, "--batch-size", 2, "--workers", 1)
    assert "truncated: 1" in olapipe(*arguments).stdout
    (folder / "b.jpg").write_bytes(good)
    assert "truncated: 1" in olapipe(*arguments).stdout, "no features were made of it, so the run goes on"
    result = olapipe(*arguments, "--retry-failed")
    assert result.exit_code == 0, result.output
    mended = digests(tmp_path / "s")
    differing = {name for name, digest in digests(store).items() if mended[name] != digest}
    plan = {"samples/0000-00000.parquet", "samples/0000.json"}
    assert differing == {*plan, "manifest.json"}, "the plan keeps the size it was made with"
    assert olapipe(*arguments).exit_code == 0, "the features are of the image as it is now"
    more = olapipe(
        "extract", folder, "--out", tmp_path / "s", "--teacher", "gen", "--checkpoint", f"gen={GOLDEN / 'gen'}"
    )
    assert more.exit_code == 0
    assert "changed" not in more.output, "a teacher added later sees the mended image too"
    (tmp_path / "s/receipts/depth/00001.json").unlink()  # as a kill while the shard was replaced leaves it
    assert "changed" not in olapipe(*arguments, "--retry-failed").output
    (folder / "b.jpg").write_bytes(good + b"\0")
    refused = olapipe(*arguments)
    assert refused.exit_code == 1
    assert "features of another image would get its name" in " ".join(refused.output.split())


def test_another_teacher_is_given_no_other_image(corpus: Path, store: Path, tmp_path: Path) -> None:
    folder, out = _copies(corpus, store, tmp_path)
    victim = next(path for path in sorted(folder.glob("*.png")))
    before = victim.read_bytes()
    victim.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    result = olapipe("extract", folder, "--out", out, "--teacher", "gen", "--checkpoint", f"gen={GOLDEN / 'gen'}")
    assert "it is not the image that the features of depth were made from" in " ".join(result.output.split())


def test_teachers_added_later_leave_the_others_as_they_are(corpus: Path, store: Path, tmp_path: Path) -> None:
    folder, out = _copies(corpus, store, tmp_path)
    before = digests(out)
    more = ["--teacher", "seg", "--checkpoint", f"seg={GOLDEN / 'seg'}"]
    result = olapipe("extract", folder, "--out", out, *more, "--workers", 1)
    assert result.exit_code == 0, result.output
    after = digests(out)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}, "the list of what there is"
    receipt = FeatureStore.open(out).receipt("seg", 3)
    assert receipt is not None and receipt.ok == 1
    picture = tmp_path / "p.png"
    result = olapipe("inspect", out, "sub/c.png", "--picture", picture, "--images", folder)
    assert result.exit_code == 0, result.output
    with Image.open(picture) as opened:
        assert opened.width > 3 * 336


def test_conversations_settings_from_a_file_and_two_teachers(tmp_path: Path) -> None:
    write_images(tmp_path / "i", "x.png", "y.png", size=(60, 45))
    samples = [{"image": "y.png"}, {"id": "text"}, {"image": "x.png"}, {"image": "y.png"}]
    (tmp_path / "c.json").write_text(json.dumps(samples))
    config = tmp_path / "extract.yaml"
    config.write_text(f"checkpoints: {{depth: {DEPTH}, gen: {GOLDEN / 'gen'}}}\nshard_size: 4\nworkers: 1\n")
    out = tmp_path / "s"
    base = ["extract", tmp_path / "c.json", "--images", tmp_path / "i", "--out", out, "--config", config]
    result = olapipe(*base, "--teacher", "depth", "--teacher", "gen", "--set", "precision=float32")
    assert result.exit_code == 0, result.output
    assert "entries without an image: 1" in result.stderr
    assert "repeated uses: 1" in result.stderr
    group = zarr.open_group(out, mode="r")
    assert (group["gen/values"].shape, group["gen/values"].dtype) == ((4, 32), np.float32)
    np.testing.assert_allclose(group["depth/values"][0], _independent_depth(tmp_path / "i" / "y.png"), atol=2e-5)
    shown = olapipe("inspect", out).stdout
    assert "depth" in shown and "gen" in shown and "4 × 32" in shown


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys, olapipe.cli; print(sorted({'torch', 'ray', 'transformers', 'zarr'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert "--teacher" in olapipe("extract", "--help").stdout


def test_teachers_are_listed() -> None:
    shown = olapipe("teachers").stdout
    assert all(name in shown for name in ("depth", "seg", "gen", "CC-BY-NC-4.0"))
