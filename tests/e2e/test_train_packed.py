"""Training from a packed set is training from the store that was packed, bit for bit."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from pipeline_support import digests, olapipe
from place_support import BUCKET, s3, s3_server
from rich.console import Console
from run_support import weights
from store_support import record
from trainer_support import (
    Corpus,
    conversation,
    end_all,
    make_corpus,
    make_store,
    metrics,
    records,
    settings,
    start_ranks,
    write_json,
)

from olaschema.config import load_config
from olaschema.errors import DamagedStoreError, FingerprintError, OlaError, StoreError
from olaschema.packed import PackedSet
from olaschema.place import open_place
from olaschema.store import FeatureStore
from olatrain.checkpoint import latest_checkpoint
from olatrain.config import TrainConfig
from olatrain.conversations import Conversations
from olatrain.packeddata import PackedData
from olatrain.train import train

__all__ = ["s3", "s3_server"]
_FIGURES = ("loss", "text", "teachers", "lr", "grad_norm", "samples", "skipped")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Rows in five shards, a failed one, an image outside the store, text alone, and a sample of two images."""
    root = tmp_path_factory.mktemp("corpus")
    corpus = make_corpus(root, images=18, texts=4)
    entries = json.loads(corpus.conversations.read_text())
    pair = conversation(corpus.keys[3], "both")
    pair["image"] = [corpus.keys[3], corpus.keys[9]]
    pair["conversations"][0]["value"] = "<image> and <image>"
    stray = corpus.images / "stray.png"
    stray.write_bytes((corpus.images / corpus.keys[0]).read_bytes())
    write_json(corpus.conversations, [*entries, pair, conversation("stray.png", "unknown")])
    pack(corpus, root / "packed")
    return corpus


def pack(corpus: Corpus, out: Path, *more: object) -> Path:
    where = ("--conversations", corpus.conversations, "--images", corpus.images, "--out", out)
    done = olapipe("pack", corpus.store, *where, *more)
    assert done.exit_code == 0, done.output
    return out


def packed_settings(corpus: Corpus, student: Path, out: Path, where: object = None, **changes: Any) -> dict[str, Any]:
    chosen = settings(corpus, student, out, **{"store": str(where or corpus.root / "packed"), **changes})
    return {name: value for name, value in chosen.items() if name not in ("conversations", "images")}


def run(chosen: dict[str, Any]) -> list[dict[str, Any]]:
    train(load_config(TrainConfig, flags=chosen), Console(quiet=True))
    return figures(Path(chosen["out"]))


def figures(out: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in _FIGURES} for line in metrics(out)]


@pytest.mark.parametrize("control", ["none", "shuffle"])
def test_every_figure_and_weight_is_that_of_the_store(
    corpus: Corpus, student: Path, tmp_path: Path, control: str
) -> None:
    changes: dict[str, Any] = {"steps": None, "epochs": 1, "target_control": control, "normalise": "channel"}
    from_store = run(settings(corpus, student, tmp_path / "store", **changes))
    from_tars = run(packed_settings(corpus, student, tmp_path / "tars", **changes, workers=2))
    assert from_tars == from_store
    one, other = weights(tmp_path / "store"), weights(tmp_path / "tars")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())
    (start,), (packed_start,) = (metrics(tmp_path / name, "start") for name in ("store", "tars"))
    assert packed_start["targets"] == start["targets"]


def test_killed_and_stopped_runs_end_with_the_same_bits(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    chosen = packed_settings(corpus, student, tmp_path / "out", steps=12, workers=2, checkpoint_every=3)
    whole = run(settings(corpus, student, tmp_path / "whole", steps=12))
    (rank,) = start_ranks(chosen, 1)
    deadline = time.monotonic() + 300
    while latest_checkpoint(tmp_path / "out/checkpoints") is None:
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.005)
    rank.kill()
    rank.join(30)
    end_all(start_ranks({**chosen, "stop_after": 9, "workers": 1}, 1))
    assert len(figures(tmp_path / "out")) == 9
    assert run({**chosen, "workers": 0}) == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_tars_of_another_size_hold_each_sample_once(corpus: Corpus, tmp_path: Path) -> None:
    where = pack(corpus, tmp_path / "packed", "--samples-per-tar", 3)
    data = PackedData(str(where))
    listing = data.listing(data.conversations())
    entries = json.loads(corpus.conversations.read_text())
    assert listing.conversations.digest == Conversations.read(corpus.conversations).digest
    packed = PackedSet.open(where)
    rows = {sample.key: sample.row for sample in FeatureStore.open(corpus.store).samples()}
    opened = data.open()
    for place, entry in enumerate(entries):
        image = entry.get("image")
        keys = [] if image is None else image if isinstance(image, list) else [image]
        assert listing.rows_of(place) == [rows.get(key, -1) for key in keys]
        for key, where_it_is in zip(keys, listing.places_of(place), strict=True):
            assert opened.image(where_it_is, key) == (corpus.images / key).read_bytes()
            assert key in opened.describe(where_it_is)
    # every image that the store knows is shuffled with its tar
    samples = [(tar, one) for tar in range(len(packed.record.tars)) for one in packed.index(tar).samples]
    inside = {one.images[0].key: tar for tar, one in samples if len(one.images) == 1}
    for place, entry in enumerate(entries):
        key = entry.get("image")
        if isinstance(key, str):
            assert listing.shards[place] == (inside[key] if key in rows else -1)


@pytest.mark.parametrize("member", ["depth.values.npy", "png", "index", "listing"])
def test_a_flipped_byte_is_found_and_named(corpus: Corpus, student: Path, tmp_path: Path, member: str) -> None:
    where = pack(corpus, tmp_path / "packed")
    packed = PackedSet.open(where)
    sample = packed.index(1).samples[0]
    name, offset, named = "000001.json", 40, "000001.json"
    if member == "listing":
        name = named = "listing.parquet"
    elif member != "index":
        (found,) = [one for one in sample.members if one.name == member]
        name, offset = "000001.tar", found.offset + found.bytes // 2
        named = f"000001.tar: {sample.number:09d}.{member}"
    damaged = bytearray((where / name).read_bytes())
    damaged[offset] ^= 1
    (where / name).write_bytes(damaged)
    with pytest.raises(DamagedStoreError, match=named):
        run(packed_settings(corpus, student, tmp_path / "out", where, workers=0, steps=None, epochs=1))


def test_a_packed_set_in_a_bucket(corpus: Corpus, student: Path, tmp_path: Path, s3: str) -> None:
    place = open_place(f"s3://{BUCKET}/{uuid4().hex}/packed")
    for name in digests(corpus.root / "packed"):
        place.publish(name, (corpus.root / "packed" / name).read_bytes())
    remote = run(packed_settings(corpus, student, tmp_path / "remote", place.url, steps=3, workers=1))
    assert remote == run(settings(corpus, student, tmp_path / "here", steps=3))
    assert all(line["requests_per_sample"] > 0 for line in metrics(tmp_path / "remote"))


def test_samples_kept_from_the_first_epoch_ask_a_bucket_nothing_and_change_no_figure(
    corpus: Corpus, student: Path, tmp_path: Path, s3: str
) -> None:
    place = open_place(f"s3://{BUCKET}/{uuid4().hex}/packed")
    for name in digests(corpus.root / "packed"):
        place.publish(name, (corpus.root / "packed" / name).read_bytes())
    changes: dict[str, Any] = {"steps": None, "epochs": 2, "batch": 5}
    given = packed_settings(corpus, student, tmp_path / "kept", place.url, **changes, keep_samples="1GiB", workers=0)
    # a continuation may keep or not
    run(given | {"stop_after": 4, "keep_samples": None})
    kept = run(given)
    plain = run(settings(corpus, student, tmp_path / "plain", **changes))
    assert kept == plain
    asked = [line["requests_per_sample"] for line in metrics(tmp_path / "kept")]
    epoch = 25 // 5
    assert len(asked) == 2 * epoch
    # the fifth step filled what the first four, before it was kept, had not; those are read once more
    assert all(asked[:epoch]) and sum(found == 0 for found in asked[epoch:]) < epoch
    run(given | {"out": str(tmp_path / "whole")})
    asked = [line["requests_per_sample"] for line in metrics(tmp_path / "whole")]
    assert all(asked[:epoch]) and not any(asked[epoch:])


def test_next_tokens_alone_train_from_a_packed_set(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    # one step over all: files alone have no shards, so their order is another
    changes: dict[str, Any] = {"teachers": {}, "train": ["projector"], "steps": 1, "batch": 25}
    (from_tars,) = run(packed_settings(corpus, student, tmp_path / "tars", **changes))
    (from_files,) = run(settings(corpus, student, tmp_path / "files", **changes, store=None))
    assert from_tars["samples"] == from_files["samples"] == 25
    assert from_tars["loss"] == pytest.approx(from_files["loss"], rel=1e-6)


def test_samples_held_out_in_a_packed_set(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    few = write_json(tmp_path / "few.json", json.loads(corpus.conversations.read_text())[:5])
    aside = pack(Corpus(corpus.root, corpus.images, few, corpus.store, corpus.keys), tmp_path / "aside")
    run(packed_settings(corpus, student, tmp_path / "a", steps=2, evaluation={"store": str(aside)}))
    run(packed_settings(corpus, student, tmp_path / "b", steps=2, evaluation={"conversations": str(few)}))
    run(settings(corpus, student, tmp_path / "c", steps=2, evaluation={"conversations": str(few)}))
    losses = [[line["teachers"] for line in metrics(tmp_path / name, "evaluation")] for name in "abc"]
    assert losses[0] == losses[1] == losses[2]


def test_samples_held_out_must_be_stored_as_those_trained_on(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    told = records()
    told["depth"] = record("int8", teacher="depth", grid=(2, 2), channels=5, view="squash")
    make_store(tmp_path / "int8", corpus.images, corpus.keys, teachers=told)
    few = write_json(tmp_path / "few.json", json.loads(corpus.conversations.read_text())[:5])
    aside = pack(Corpus(corpus.root, corpus.images, few, tmp_path / "int8", corpus.keys), tmp_path / "aside")
    values = packed_settings(corpus, student, tmp_path / "a", steps=2, evaluation={"store": str(aside)})
    with pytest.raises(StoreError, match=r"depth is stored as float16 in .*, as int8 in .*aside"):
        run(values)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": "images"}, "conversations and images go together"),
        ({"conversations": "c.json", "images": "images"}, "packed training set, which holds its own"),
        ({"evaluation": {"every": 3}}, "one of the two"),
        ({"store": None, "teachers": {}}, "or a packed training set as store"),
        ({"store": "features.zarr"}, "is no packed training set, and conversations and images are missing"),
        ({"cache_dir": "cache"}, "cache_dir keeps files of stores in buckets"),
        ({"cache_limit": "1GiB"}, "cache_limit is given, but not cache_dir"),
        ({"teachers": {"seg": {"layers": [1]}}}, "has no features of the teacher 'seg'.*depth, gen"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    corpus: Corpus, student: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    files = {"images": str(corpus.images), "c.json": str(corpus.conversations), "features.zarr": str(corpus.store)}
    changes = {name: files.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(OlaError, match=f"(?s){problem}"):
        run(packed_settings(corpus, student, tmp_path / "out") | changes)


def test_a_pinned_fingerprint_is_compared_with_the_set(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    pinned = PackedSet.open(corpus.root / "packed").teachers["depth"].fingerprint
    other = pinned.model_copy(update={"weights": "0" * 64}).model_dump(mode="json")
    with pytest.raises(FingerprintError, match=r"weights"):
        run(packed_settings(corpus, student, tmp_path / "out", fingerprints={"depth": other}))


@pytest.mark.parametrize("layout", ["packed", "store"])
def test_a_cache_of_remote_files_changes_no_figure_and_spares_requests(
    corpus: Corpus, student: Path, tmp_path: Path, s3: str, layout: str
) -> None:
    """Smaller than an epoch's files: they are fetched again, and the limit holds."""
    place = open_place(f"s3://{BUCKET}/{uuid4().hex}/{layout}")
    for name in digests(corpus.root / layout):
        place.publish(name, (corpus.root / layout / name).read_bytes())
    limit = 70_000 if layout == "packed" else 1_000
    remote = {"store": place.url, "cache_dir": str(tmp_path / "cache"), "cache_limit": limit}
    remote["workers"] = 1 if layout == "packed" else 0  # a loader process of its own is a second's start
    changes = {"steps": 8}
    made = packed_settings if layout == "packed" else settings
    assert run(made(corpus, student, tmp_path / "out") | remote | changes) == run(
        settings(corpus, student, tmp_path / "here", **changes)
    )
    kept = list((tmp_path / "cache/files").iterdir())
    assert 0 < sum(path.stat().st_size for path in kept) <= limit
    for path in kept:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    asked = sum(line["requests_per_sample"] * line["samples"] for line in metrics(tmp_path / "out"))
    roomy = {**remote, "cache_limit": "1GiB", "workers": 0, "cache_dir": str(tmp_path / "roomy")}
    run(made(corpus, student, tmp_path / "again") | roomy | changes)
    less = sum(line["requests_per_sample"] * line["samples"] for line in metrics(tmp_path / "again"))
    assert 0 < less < asked
    name = "000001.tar" if layout == "packed" else "depth/values/c/1/0/0/0"
    damaged = bytearray(place.read(name))
    damaged[len(damaged) // 2] ^= 1
    place.publish(name, bytes(damaged))
    with pytest.raises(DamagedStoreError, match=f"{place.url}/{name}"):
        run(made(corpus, student, tmp_path / "damaged") | roomy | changes | {"cache_dir": str(tmp_path / "fresh")})
