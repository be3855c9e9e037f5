"""Mixtures: each source's samples a fixed number of times per epoch, whatever workers and interruptions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_support import olapipe
from rich.console import Console
from store_support import make_store as simple_store
from trainer_support import (
    Corpus,
    conversation,
    end_all,
    make_corpus,
    make_images,
    make_store,
    metrics,
    records,
    saved,
    settings,
    start_ranks,
    write_json,
)

from olaschema.config import load_config
from olaschema.errors import ConfigError, FingerprintError, StoreError
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.checkpoint import latest_checkpoint
from olatrain.config import TrainConfig
from olatrain.mixeddata import MixedData
from olatrain.parallel import open_ranks
from olatrain.setup import set_up
from olatrain.storedata import StoreData
from olatrain.stream import Sample
from olatrain.train import train

REPEATS = (2, 3, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a packed set whose keys are those of the store but not its images, and another store."""
    root = tmp_path_factory.mktemp("mixture")
    make_corpus(root / "a", images=6, texts=2)
    keys = make_images(root / "b/images", 5, seed=1)
    make_store(root / "b/store", root / "b/images", keys, seed=6)
    write_json(root / "b/conversations.json", [conversation(key, f"of b {key}") for key in keys])
    where = (
        "--conversations",
        root / "b/conversations.json",
        "--images",
        root / "b/images",
        "--out",
        root / "b/packed",
    )
    assert olapipe("pack", root / "b/store", *where).exit_code == 0
    keys = make_images(root / "c/images", 4, seed=2)
    make_store(root / "c/store", root / "c/images", keys[:3], seed=7)
    write_json(root / "c/conversations.json", [conversation(key, f"of c {key}") for key in keys])
    return root


def mixed(root: Path, student: Path, out: Path, **changes: Any) -> dict[str, Any]:
    def files(name: str) -> dict[str, str]:
        where = {"store": "store", "conversations": "conversations.json", "images": "images"}
        return {setting: str(root / name / path) for setting, path in where.items()}

    a, b, c = REPEATS
    sources = [
        files("a") | {"repeats": a}, {"store": str(root / "b/packed"), "repeats": b}, files("c") | {"repeats": c}
    ]  # fmt: skip
    unused = Corpus(root, root, root, root, [])
    chosen = settings(unused, student, out, sources=sources, steps=None, epochs=2, batch=5, checkpoint_every=100)
    return {k: v for k, v in chosen.items() if k not in ("store", "conversations", "images")} | changes


def test_an_epoch_has_each_sample_as_often_as_its_source_says_with_its_own_features(
    root: Path, student: Path, tmp_path: Path
) -> None:
    config = load_config(TrainConfig, flags=mixed(root, student, tmp_path / "out"))
    with open_ranks("cpu", nproc=1, negatives="world") as ranks:
        run = set_up(config, ranks)
    entries = {name: json.loads((root / name / "conversations.json").read_text()) for name in "abc"}
    tokenizer = run.stream._source.prompts._tokenizer
    wanted: Counter[str] = Counter()
    for name, repeats in zip("abc", REPEATS, strict=True):
        for entry in entries[name]:
            wanted[entry["conversations"][1]["value"].strip() + name * bool(entry.get("image"))] = repeats
    total = sum(wanted.values())
    assert run.samples == total == 2 * 9 + 3 * 5 + 4
    for epoch in (0, 1):
        seen: Counter[str] = Counter()
        identities: dict[str, set[int]] = {}
        for position in range(epoch * total, (epoch + 1) * total):
            sample = run.stream[position]
            assert isinstance(sample, Sample)
            answer = tokenizer.decode([label for label in sample.labels if label >= 0], skip_special_tokens=True)
            name = _source_of(root, sample)
            seen[answer.strip() + name] += 1
            identities.setdefault(f"{name} {sample.keys}", set()).update(sample.rows)
        assert seen == wanted
    # repetitions are one image; equal keys of different sources are not
    stored = [ids for ids in identities.values() if ids and ids != {-1}]
    assert all(len(ids) == 1 for ids in stored)
    assert len(set().union(*stored)) == 6 + 5 + 3


def _source_of(root: Path, sample: Sample) -> str:
    """Which source a sample's features and pixels are of; nothing for text alone."""
    if not sample.keys:
        return ""
    feature = sample.features[0]["depth"]
    if feature is None:
        return "c"  # only there is an image without one
    rows = {"a": 6, "b": 5, "c": 3}
    for name, count in rows.items():
        reader = FeatureReader(FeatureStore.open(root / name / "store"), "depth")
        row = int(Path(sample.keys[0]).stem)
        if row < count and (reader.read(row).values == feature.values).all():
            return name
    raise AssertionError("the feature is nobody's")


def test_a_mixture_stopped_and_continued_on_other_workers_ends_with_the_same_bits(
    root: Path, student: Path, tmp_path: Path
) -> None:
    values = mixed(root, student, tmp_path / "whole", workers=1)
    kept = {"predictions": {"every": 8, "images": 3}}
    train(load_config(TrainConfig, flags=values | kept), Console(quiet=True))
    layer = FeatureStore.open(tmp_path / "whole/predictions/step-00000008/layer-02")
    assert FeatureReader(layer, "depth").feature(2).shape == layer.teacher("depth").fingerprint.shape
    values |= {"out": str(tmp_path / "out")}
    for workers, stop in ((2, 4), (0, 9), (1, None)):
        end_all(start_ranks(values | {"workers": workers, "stop_after": stop}, 1, record=tmp_path))
    seen = [json.loads(line) for path in tmp_path.glob("seen-*") for line in path.read_text().splitlines()]
    assert Counter(position for position, _ in seen) == Counter(range(2 * 37))
    for epoch in (0, 1):
        assert Counter(index for position, index in seen if position // 37 == epoch) == Counter(range(37))
    assert [line["loss"] for line in metrics(tmp_path / "out")] == [
        line["loss"] for line in metrics(tmp_path / "whole")
    ]
    newest = [latest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "out")]
    one, other = (saved(path, "trainable") for path in newest if path is not None)
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_two_sources_of_one_store_show_the_same_images(root: Path, student: Path, tmp_path: Path) -> None:
    keys = [entry["image"] for entry in json.loads((root / "c/conversations.json").read_text())]
    write_json(tmp_path / "more.json", [conversation(key, f"again {key}") for key in keys])
    first = {"store": str(root / "c/store"), "conversations": str(root / "c/conversations.json")}
    second = {"store": str(root / "c" / ".." / "c/store"), "conversations": str(tmp_path / "more.json")}
    images = {"images": str(root / "c/images")}
    config = load_config(
        TrainConfig,
        flags=mixed(
            root, student, tmp_path / "out", sources=[first | images, second | images], target_control="shuffle"
        ),
    )
    with open_ranks("cpu", nproc=1, negatives="world") as ranks:
        run = set_up(config, ranks)
    assert run.samples == 8
    identities: dict[str, set[int]] = {}
    reader = FeatureReader(FeatureStore.open(root / "c/store"), "depth")
    for position in range(8):
        sample = run.stream[position]
        assert isinstance(sample, Sample)
        identities.setdefault(sample.keys[0], set()).update(sample.rows)
        stored = sample.features[0]["depth"]
        own = keys.index(sample.keys[0])
        if stored is not None and own < 3:
            assert (stored.values != reader.read(own).values).any(), "shuffled to itself"
    assert all(len(found) == 1 for found in identities.values())
    assert len({min(found) for found in identities.values() if found != {-1}}) == 3
    counted = run.counts["targets"]["depth"]
    assert counted["valid"] == 6
    assert counted["missing"] == {"not-in-store": 2}


def test_features_of_two_meanings_are_not_mixed(root: Path, student: Path, tmp_path: Path) -> None:
    keys = make_images(tmp_path / "images", 2)
    make_store(tmp_path / "store", tmp_path / "images", keys, teachers=records(view="pad"))
    write_json(tmp_path / "c.json", [conversation(keys[0], "x")])
    values = mixed(root, student, tmp_path / "out")
    values["sources"].append(
        {
            "store": str(tmp_path / "store"),
            "conversations": str(tmp_path / "c.json"),
            "images": str(tmp_path / "images"),
        }
    )
    with pytest.raises(FingerprintError, match=f"view(?s:.*)in {tmp_path}/store"):
        train(load_config(TrainConfig, flags=values), Console(quiet=True))


def test_features_with_and_without_offsets_are_not_mixed(tmp_path: Path) -> None:
    for name in ("new", "old"):
        simple_store(tmp_path / name, precision="int8", centred=name == "new")
    parts = tuple(StoreData.at(str(tmp_path / name), ("depth",), tmp_path, tmp_path) for name in ("new", "old"))
    assert MixedData(parts[:1], (1,)).teacher("depth").centred
    with pytest.raises(StoreError, match="only one of them with offsets") as caught:
        MixedData(parts, (1, 1)).teacher("depth")
    assert str(tmp_path / "old") in caught.value.problem


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"store": "s"}, "sources stand in place of store"),
        ({"sources": [{"images": "i", "conversations": "c"}]}, "a source has no store"),
        ({"sources": [{"repeats": 2}]}, "a source has conversations and images, or"),
        ({"sources": [{"store": "s", "images": "i"}]}, "of a source go together"),
        ({"evaluation": {"conversations": "c"}}, "takes a packed set as evaluation.store"),
    ],
)
def test_mixtures_without_a_meaning_are_refused(
    root: Path, student: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(TrainConfig, flags=mixed(root, student, tmp_path / "out") | changes)
