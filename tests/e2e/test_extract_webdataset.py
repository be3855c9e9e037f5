"""`extract --format webdataset`: what `extract` and `pack` make together, at once; refused where it cannot be that."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from pipeline_support import depth_arguments, digests, image_bytes, olapipe, ray_session, write_images

from olaschema.packed import PackedSet
from olaschema.store import FeatureStore

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]

PACKED = ("--format", "webdataset")
SMALL = ("--shard-size", 2, "--batch-size", 2, "--workers", 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files, one of them no image; conversations over six, with a pair across shards, text and a bad entry."""
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder / "images", *(f"{place}.png" for place in range(7)), size=(60, 45))
    (folder / "images/3.png").write_bytes(b"not an image")
    entries = [{"image": f"{place}.png", "conversations": [{"from": "gpt", "value": str(place)}]} for place in range(6)]
    entries += [entries[1], {"conversations": []}, {"image": "gone.png"}, {"image": ["0.png", "5.png"]}]
    (folder / "c.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module", params=["folder", "conversations"])
def both(
    request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """Arguments of the corpus, and the set that `extract` and `pack` make of it."""
    folder = tmp_path_factory.mktemp("pack")
    talk = request.param == "conversations"
    more = ("--images", root / "images") if talk else ()
    corpus = root / "c.json" if talk else root / "images"
    arguments = depth_arguments(corpus, folder / "s", *SMALL, *more)
    assert olapipe(*arguments).exit_code == 0
    about = ("--conversations", root / "c.json") if talk else ()
    done = olapipe("pack", folder / "s", "--images", root / "images", "--out", folder / "p", *about)
    assert done.exit_code == 0, done.output
    arguments[arguments.index("--out") + 1] = "OUT"
    return [*arguments, *map(str, PACKED)], folder / "p"


def direct(arguments: list[str], out: Path, *more: object) -> list[str]:
    return [str(out) if word == "OUT" else word for word in arguments] + list(map(str, more))


def test_it_is_what_extract_and_pack_make(both: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, packed = both
    for workers in (1, 2):
        out = tmp_path / str(workers)
        done = olapipe(*direct(arguments, out, "--workers", workers))
        assert done.exit_code == 0, done.output
        assert digests(out) == digests(packed)
        # no second copy of the features stays
        assert not list((out / "_log/store").glob("depth/*/c/*"))
        assert len(FeatureStore.open(out / "_log/store").committed("depth")) > 2
    assert "samples, " in done.output and "depth: images without a feature: 1 not-an-image" in done.output
    assert olapipe("verify", out).exit_code == 0
    again = olapipe(*direct(arguments, out))
    assert again.exit_code == 0, again.output
    assert "0 of them written now" in again.output
    assert digests(out) == digests(packed)


def test_a_set_without_conversations_holds_each_image_once(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    assert olapipe(*depth_arguments(root / "images", out, *SMALL, *PACKED)).exit_code == 0
    found = list(PackedSet.open(out).listing())
    assert [image.key for image in found] == [f"{place}.png" for place in range(7)]
    assert [image.statuses["depth"] for image in found] == ["ok"] * 3 + ["not-an-image"] + ["ok"] * 3
    assert PackedSet.open(out).conversations() == b""


@pytest.fixture(scope="module")
def written(both: tuple[list[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that the command writes directly."""
    out = tmp_path_factory.mktemp("written") / "p"
    assert olapipe(*direct(both[0], out)).exit_code == 0
    return out


@pytest.mark.parametrize("spoil", ["torn", "gone", "index"])
def test_a_rerun_mends_a_tar_whose_features_are_gone(
    both: tuple[list[str], Path], written: Path, tmp_path: Path, spoil: str
) -> None:
    arguments, packed = both
    out = shutil.copytree(written, tmp_path / "p")
    untouched = (out / "000000.tar").stat().st_mtime_ns
    if spoil == "torn":
        with (out / "000001.tar").open("r+b") as file:
            file.truncate(700)
    else:
        (out / ("000001.tar" if spoil == "gone" else "000001.json")).unlink()
    assert olapipe("verify", out).exit_code == 1
    done = olapipe(*direct(arguments, out))
    assert done.exit_code == 0, done.output
    assert "shards to extract again" in done.output
    assert "1 of them written now" in done.output
    assert digests(out) == digests(packed)
    assert (out / "000000.tar").stat().st_mtime_ns == untouched


def test_what_a_packed_set_cannot_become_is_refused(root: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "p"
    shutil.copytree(root / "images", images)
    arguments = depth_arguments(images, out, *SMALL, *PACKED)
    assert olapipe(*arguments).exit_code == 0
    before = digests(out)
    more = olapipe(*arguments, "--teacher", "gen", "--checkpoint", f"gen={root}")
    assert more.exit_code == 1
    assert "is packed with the teachers depth: it gets no others" in more.output
    assert "Choose a new folder" in more.output
    (images / "new.png").write_bytes(image_bytes(9))
    grown = olapipe(*arguments)
    assert grown.exit_code == 1
    assert "1 images of the corpus are not in it" in grown.output
    (images / "new.png").unlink()
    retried = olapipe(*arguments, "--retry-failed")
    assert retried.exit_code == 2
    assert "retry_failed needs a feature store" in retried.output
    store = olapipe(*depth_arguments(images, out, *SMALL))
    assert store.exit_code == 1
    assert "is not a feature store" in store.output
    shutil.rmtree(out / "_log")
    alone = olapipe(*arguments)
    assert alone.exit_code == 1
    assert "without the working store that it was made from" in alone.output
    assert digests(out) == before


def test_a_feature_store_is_no_place_for_a_packed_set(root: Path, tmp_path: Path) -> None:
    FeatureStore.create(tmp_path / "s")
    done = olapipe(*depth_arguments(root / "images", tmp_path / "s", *PACKED))
    assert done.exit_code == 1
    assert "holds something else: zarr.json" in done.output


def test_an_image_that_changes_meanwhile_stops_the_job(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olapipe import pack

    monkeypatch.setattr(pack, "read_rooted", lambda images, key: (root / "images/6.png").read_bytes())
    done = olapipe(*depth_arguments(root / "images", tmp_path / "p", *SMALL, *PACKED))
    assert done.exit_code == 1
    # of whichever shard is done first
    assert re.search(r"[024]\.png: the image is not the one that the features of depth were made from", done.output)
    monkeypatch.undo()
    assert not (tmp_path / "p/packed.json").exists()
    assert olapipe(*depth_arguments(root / "images", tmp_path / "p", *SMALL, *PACKED)).exit_code == 0
    assert olapipe("verify", tmp_path / "p").exit_code == 0
