"""`olapipe pack`: shards that plain webdataset decodes, the same bytes after any interruption, damage found by name."""

from __future__ import annotations

import gc
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_support import digests, olapipe
from store_support import DOCS, decoding
from trainer_support import conversation, make_images, make_store, write_json

from olaschema.errors import DamagedStoreError
from olaschema.packed import PackedSet
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten images, shards of four; image 1 has no depth, image 9 is unknown to the store."""
    keys = make_images(tmp_path / "images", 10)
    make_store(tmp_path / "store", tmp_path / "images", keys[:9], failed={keys[1]: "depth"})
    entries: list[Any] = [conversation(key, f"about {key}") for key in keys[::-1]]
    entries += [conversation(keys[2], "again"), conversation(None, "text"), conversation("gone.png", "x"), "no object"]
    pair = conversation(keys[3], "two")
    pair["image"] = [keys[3], keys[4]]
    pair["conversations"][0]["value"] = "<image><image> compare"
    write_json(tmp_path / "c.json", [*entries, pair])
    return tmp_path


def pack(corpus: Path, out: str = "packed", *more: object) -> Any:
    where = ("--conversations", corpus / "c.json", "--images", corpus / "images", "--out", corpus / out)
    return olapipe("pack", corpus / "store", *where, *more)


def documented(tars: list[str]) -> Any:
    """The samples by the snippet of docs/store-format.md."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "import webdataset" in block)
    space: dict[str, Any] = {"tars": tars}
    exec(compile(code, "docs/store-format.md", "exec"), space)  # noqa: S102
    return space["samples"]


# webdataset leaves its files open for the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_decodes_every_sample_as_documented(corpus: Path) -> None:
    done = pack(corpus)
    assert done.exit_code == 0, done.output
    tars = sorted(map(str, (corpus / "packed").glob("*.tar")))
    samples = list(documented(tars))
    gc.collect()
    found = {sample["__key__"]: sample for sample in samples}
    entries = json.loads((corpus / "c.json").read_text())
    # rows 0 to 8, the pair behind image 3, the unknown one, text
    pictures = [tuple(image["key"] for image in sample["json"]["images"]) for sample in samples]
    single = [(f"{n:02d}.png",) for n in range(10)]
    assert sorted(pictures) == sorted([*single, ("03.png", "04.png"), ()])
    assert pictures[-2:] == [("09.png",), ()]
    packed = [entry for sample in samples for entry in sample["json"]["conversations"]]
    wanted = [entry for entry in entries if isinstance(entry, dict) and entry.get("image") != "gone.png"]
    assert sorted(map(json.dumps, packed)) == sorted(map(json.dumps, wanted))
    store = FeatureStore.open(corpus / "store")
    decode = decoding(DOCS, "float16")
    reader = FeatureReader(store, "depth")
    for sample in found.values():
        for place, image in enumerate(sample["json"]["images"]):
            name = f"{place}.depth.values.npy" if place else "depth.values.npy"
            assert (name in sample) == (image["row"] not in (-1, 1))
            if name in sample:
                np.testing.assert_array_equal(decode(values=sample[name], channels=5), reader.feature(image["row"]))
            assert sample[image["member"]].size == (24, 20)
    assert "depth: images without a feature: 1 not-finite, 1 not-in-store" in done.output
    assert "1 missing, 1 not-an-object" in done.output


def test_image_bytes_and_headers_are_fixed(corpus: Path) -> None:
    pack(corpus)
    with tarfile.open(corpus / "packed/000000.tar") as tar:
        infos = tar.getmembers()
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}
        member = tar.extractfile("000000000.png")
        assert member is not None
        assert member.read() == (corpus / "images/00.png").read_bytes()


@pytest.mark.parametrize("spoil", ["no root", "no index", "torn tar", "longer plan"])
def test_an_interrupted_packing_ends_in_the_same_bytes(corpus: Path, spoil: str) -> None:
    pack(corpus, "whole")
    pack(corpus, "other")
    other = corpus / "other"
    assert digests(other) == digests(corpus / "whole")
    untouched = (other / "000000.tar").stat().st_mtime_ns
    if spoil == "no root":
        (other / "packed.json").unlink()
    elif spoil == "no index":
        (other / "packed.json").unlink()
        (other / "000001.json").unlink()
    elif spoil == "torn tar":
        (other / "000001.tar").write_bytes(b"torn")
    else:
        (other / "000009.tar").write_bytes(b"x")
    assert pack(corpus, "other").exit_code == 0
    assert digests(other) == digests(corpus / "whole")
    assert (other / "000000.tar").stat().st_mtime_ns == untouched


def test_tars_of_a_chosen_size(corpus: Path) -> None:
    pack(corpus, "packed", "--samples-per-tar", 3)
    assert len(list((corpus / "packed").glob("*.tar"))) == 5  # 11 samples with images in 4, text in another
    sizes = [len(PackedSet.open(corpus / "packed").index(tar).samples) for tar in range(5)]
    assert sizes == [3, 3, 3, 2, 1]


def test_a_changed_image_stops_the_packing(corpus: Path) -> None:
    (corpus / "images/05.png").write_bytes((corpus / "images/06.png").read_bytes())
    done = pack(corpus)
    assert done.exit_code == 1
    assert "05.png: the image is not the one that the features of depth were made from" in done.output
    assert not (corpus / "packed/packed.json").exists()


def test_a_folder_of_something_else_is_left_alone(corpus: Path) -> None:
    (corpus / "packed").mkdir()
    (corpus / "packed/thesis.txt").write_text("mine")
    done = pack(corpus)
    assert done.exit_code == 1
    assert "holds something else: thesis.txt" in done.output


def test_verify_names_the_file_of_every_flipped_byte(corpus: Path) -> None:
    pack(corpus)
    root = corpus / "packed"
    assert olapipe("verify", root).exit_code == 0
    rng = np.random.default_rng(0)
    for name in digests(root):
        data = (root / name).read_bytes()
        for place in rng.integers(0, len(data), 8):
            spoiled = bytearray(data)
            spoiled[place] ^= 1 << int(rng.integers(8))
            (root / name).write_bytes(bytes(spoiled))
            done = olapipe("verify", root)
            assert done.exit_code == 1, (name, place)
            assert name in done.output, (name, place)
        (root / name).write_bytes(data)
    assert olapipe("verify", root).exit_code == 0
    (root / "deep").mkdir()
    (root / "deep" / "x").write_bytes(b"")
    done = olapipe("verify", root)
    assert done.exit_code == 1 and "deep/x: is named by nothing" in done.output


def test_reading_finds_damage_and_names_the_member(corpus: Path) -> None:
    pack(corpus)
    packed = PackedSet.open(corpus / "packed")
    found = {(f.row, f.tar): f for f in packed.listing()}[(5, 1)]
    feature = FeatureReader(FeatureStore.open(corpus / "store"), "gen").read(5)
    np.testing.assert_array_equal(packed.read(found, "gen").values, feature.values)
    assert packed.image(found) == (corpus / "images/05.png").read_bytes()
    sample = packed.index(1).samples[found.sample]
    (member,) = [m for m in sample.members if m.name == "gen.values.npy"]
    path = corpus / "packed/000001.tar"
    data = bytearray(path.read_bytes())
    data[member.offset + member.bytes - 1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedStoreError, match=rf"000001\.tar: {sample.number:09d}\.gen\.values\.npy fails"):
        packed.read(found, "gen")
    done = olapipe("verify", corpus / "packed")
    assert f"000001.tar: {sample.number:09d}.gen.values.npy: fails its checksum" in done.output


def test_inspect_shows_what_is_packed(corpus: Path) -> None:
    pack(corpus)
    shown = json.loads(olapipe("inspect", corpus / "packed", "--json").output)
    assert (shown["conversations"], shown["samples"], shown["images"]) == (13, 12, 12)
    assert shown["teachers"]["depth"]["images"] == {"not-finite": 1, "not-in-store": 1, "ok": 10}
    assert shown["left_out"] == {"missing": 1, "not-an-object": 1}
