"""The fitted tier through the commands: extract, grow, verify, repair, live, forget, merge, drop, fidelity, auto."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from pipeline_support import DEPTH, depth_arguments, digests, olapipe, ray_session, start_olapipe, write_images
from store_support import DOCS, decoding

from olapipe.config import ExtractConfig
from olapipe.corpus import list_corpus
from olapipe.progress import LineReporter
from olapipe.teachers import registry
from olapipe.teachers.base import TeacherSettings
from olapipe.tiers import Tier, choose
from olaschema.images import decode_image
from olaschema.manifest import ChannelStatistics
from olaschema.place import LocalPlace
from olaschema.precision import blank
from olaschema.reader import FeatureReader
from olaschema.seal import seal, unseal
from olaschema.store import FeatureStore

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]
NAMES = [f"{index:02d}.png" for index in range(12)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("klt") / "c"
    write_images(folder, *NAMES, size=(60, 45))
    return folder


def arguments(corpus: Path, out: Path, *more: object, workers: int = 1) -> list[str]:
    fixed = ["--shard-size", 4, "--batch-size", 2, "--workers", workers, "--precision", "klt"]
    return depth_arguments(corpus, out, *fixed, *more)


@pytest.fixture(scope="module")
def store(corpus: Path) -> Path:
    out = corpus.parent / "s"
    result = olapipe(*arguments(corpus, out))
    assert result.exit_code == 0, result.output
    return out


def test_it_decodes_by_the_docs_to_what_the_teacher_says(store: Path, corpus: Path) -> None:
    teacher = registry.load("depth", TeacherSettings(checkpoint=str(DEPTH)))
    group = zarr.open_group(store, mode="r")["depth"]
    arrays = {name: array[:] for name, array in group.arrays()}
    decoded = decoding(DOCS, "klt")(channels=48, basis=store / "bases" / "depth.npy", **arrays)
    record = FeatureStore.open(store).teacher("depth").basis
    assert record is not None
    assert record.images == 12
    for row, name in enumerate(NAMES):
        pixels = teacher.preprocessor(decode_image((corpus / name).read_bytes(), name=name))
        exact = teacher.encode(torch.from_numpy(pixels)[None])[0].numpy()
        steps = np.repeat(arrays["scale"][row].astype(np.float64), 64, axis=-1)[..., :48]
        assert steps.min() == record.step
        bound = np.linalg.norm(steps) / 2 * (1 + 2.0**-8) + 2.0**-15 * np.linalg.norm(exact)
        assert np.linalg.norm(decoded[row] - exact) <= bound + 1e-4 * np.linalg.norm(exact)


def test_workers_and_kills_change_no_byte(store: Path, corpus: Path, tmp_path: Path) -> None:
    wanted = digests(store)
    result = olapipe(*arguments(corpus, tmp_path / "two", workers=2))
    assert result.exit_code == 0, result.output
    assert digests(tmp_path / "two") == wanted
    process = start_olapipe(*arguments(corpus, tmp_path / "killed"))
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("receipts/depth/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    result = olapipe(*arguments(corpus, tmp_path / "killed"))
    assert result.exit_code == 0, result.output
    assert digests(tmp_path / "killed") == wanted


def test_growth_keeps_the_basis(store: Path, corpus: Path, tmp_path: Path) -> None:
    out, folder = shutil.copytree(store, tmp_path / "s"), shutil.copytree(corpus, tmp_path / "c")
    before = digests(out)
    write_images(folder, *NAMES, "new.png", size=(60, 45))
    assert olapipe(*arguments(folder, out)).exit_code == 0
    after = digests(out)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"depth/values/zarr.json", "depth/scale/zarr.json", "manifest.json"}
    assert olapipe("verify", out).exit_code == 0
    # a rerun of auto keeps what is there
    assert olapipe(*arguments(folder, out, "--precision", "auto")).exit_code == 0
    assert digests(out) == after
    refused = olapipe(*depth_arguments(folder, out))
    assert refused.exit_code == 1
    assert "stored as klt, float16 was asked for" in refused.stderr


def test_verify_names_a_damaged_basis_and_repair_refuses_to_make_another(
    store: Path, corpus: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(store, tmp_path / "s")
    data = bytearray((out / "bases" / "depth.npy").read_bytes())
    data[200] ^= 1
    (out / "bases" / "depth.npy").write_bytes(bytes(data))
    result = olapipe("verify", out)
    assert result.exit_code == 1
    assert "bases/depth.npy" in result.stdout
    repaired = olapipe("verify", out, "--repair", "--images", corpus, "--checkpoint", f"depth={DEPTH}")
    assert repaired.exit_code != 0
    assert "Restore it from a copy" in repaired.output


def test_a_damaged_shard_is_repaired_and_features_agree_live(store: Path, corpus: Path, tmp_path: Path) -> None:
    out = shutil.copytree(store, tmp_path / "s")
    wanted = digests(out)
    shard = out / "depth" / "values" / "c" / "1" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(bytes(data))
    given = ("--images", corpus, "--checkpoint", f"depth={DEPTH}", "--set", "batch_size=2")
    assert olapipe("verify", out, "--repair", *given[:4]).exit_code == 0
    assert digests(out) == wanted
    found = olapipe("verify", out, "--live", 3, *given[:4], "--json")
    assert found.exit_code == 0, found.output
    live = json.loads(found.stdout[found.stdout.index("{") :])["live"]
    assert all(0 < entry["relative"] < 0.1 for entry in live)
    # rows exchanged in a store whose digests are right would be another image's
    exchanged = _exchange(out)
    other = olapipe("verify", exchanged, "--live", 3, *given[:4], "--json")
    assert other.exit_code == 1, other.output


def _exchange(out: Path) -> Path:
    """Give the first shard the features of the second one, with all digests right."""
    store = FeatureStore.open(out)
    reader, record = FeatureReader(store, "depth"), store.teacher("depth")
    rows = [(reader.read(row), reader.feature(row)) for row in range(12)]
    unseal(store, ["depth"])
    for shard in range(3):
        receipt = store.receipt("depth", shard)
        assert receipt is not None
        stored, statistics = blank(4, record.fingerprint.shape, "klt"), ChannelStatistics(48)
        for index in range(4):
            stored[index], feature = rows[(4 * shard + index + 1) % 12]
            statistics.update(feature)
        store.commit_shard(record, shard, stored, list(receipt.rows), statistics, receipt.execution, replace=True)
    seal(store, ["depth"])
    return out


def test_forget_merge_copy_pack_and_drop(store: Path, corpus: Path, tmp_path: Path) -> None:
    out = shutil.copytree(store, tmp_path / "s")
    assert olapipe("forget", out, "05.png", "--yes").exit_code == 0
    assert olapipe("verify", out).exit_code == 0
    assert olapipe("copy", out, tmp_path / "copy").exit_code == 0
    assert digests(tmp_path / "copy") == digests(out)
    merged = olapipe("merge", out, store, "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    assert olapipe("verify", tmp_path / "merged").exit_code == 0
    assert (tmp_path / "merged" / "bases" / "depth.npy").read_bytes() == (store / "bases" / "depth.npy").read_bytes()
    conversations = tmp_path / "talk.json"
    conversations.write_text(json.dumps([{"id": "a", "image": "00.png", "conversations": []}]))
    packed = olapipe("pack", out, "--conversations", conversations, "--images", corpus, "--out", tmp_path / "tars")
    assert packed.exit_code == 1
    assert "no place for its basis" in packed.stderr
    assert olapipe("drop", out, "--teacher", "depth", "--yes").exit_code == 0
    assert not (out / "bases" / "depth.npy").exists()
    assert olapipe("verify", out).exit_code == 0


def test_auto_takes_the_smallest_that_passes_and_says_why(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    given = depth_arguments(corpus, out, "--shard-size", 4, "--workers", 1, "--precision", "auto")
    result = olapipe(*given, "--max-gradient-error", "0.4")
    assert result.exit_code == 0, result.output
    chosen = FeatureStore.open(out).teacher("depth")
    assert chosen.precision in ("klt", "int4")
    refused = olapipe(*depth_arguments(corpus, tmp_path / "x", "--max-gradient-error", "0.01"))
    assert refused.exit_code == 2
    assert "only --precision auto and klt are fitted" in refused.stderr


def test_the_same_corpus_and_settings_choose_the_same(corpus: Path, tmp_path: Path) -> None:
    listing, place = list_corpus(corpus, None), LocalPlace(tmp_path)

    def chosen(limit: float) -> Tier:
        config = ExtractConfig(
            corpus=corpus, out=tmp_path, teachers=("depth",), checkpoints={"depth": str(DEPTH)}, precision="auto",
            max_gradient_error=limit, fit_images=9,
        )  # fmt: skip
        return choose(config, listing, None, place, LineReporter(io.StringIO()))["depth"]

    tight, loose, again = chosen(1e-8), chosen(0.3), chosen(0.3)
    assert tight.precision == "float32"
    assert loose.precision == again.precision
    assert loose.precision != "float32"
    lines = [json.loads(text) for text in (tmp_path / "_log" / "precision.jsonl").read_text().splitlines()]
    assert [line["chosen"] for line in lines] == [tight.precision, loose.precision, loose.precision]
    for line, limit in zip(lines, (1e-8, 0.3, 0.3), strict=True):
        assert (line["fitted_on"], line["scored_on"]) == (5, 4)
        passing = [tier for tier in line["figures"] if tier["changes"] and _error(tier) <= limit]
        assert line["chosen"] == min(passing, key=lambda tier: tier["stored_bytes"])["name"]


def _error(tier: dict) -> float:  # type: ignore[type-arg]
    last = tier["changes"][-1]
    return 1 - min(last["smooth_l1"], last["contrastive"])


def test_fidelity_of_a_corpus_with_the_teachers_bfloat16_beside_it(corpus: Path, tmp_path: Path) -> None:
    given = ["fidelity", corpus, "--teacher", "depth", "--checkpoint", DEPTH, "--samples", 12]
    result = olapipe(*given, "--json", "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    figures = {tier["name"]: tier for tier in json.loads(result.stdout)["figures"]}
    assert list(figures) == ["float32", "float16", "int8", "int4", "klt", "bfloat16 teacher"]
    assert figures["float32"]["relative_l2"] == 0
    assert 0 < figures["float16"]["relative_l2"] < figures["int8"]["relative_l2"] < figures["int4"]["relative_l2"]
    # bfloat16 keeps 8 bits, through every layer
    assert 2.0**-9 < figures["bfloat16 teacher"]["relative_l2"] < 0.1
    assert figures["int8"]["raw_bytes"] == 576 * (48 + 2) + 2 * 48  # offsets
    assert (tmp_path / "plot.png").stat().st_size > 5000
    shown = olapipe(*given)
    assert "bfloat16 teacher" in shown.stdout and "6 images scored" in shown.stdout
