"""One contract for every layout of features, in a folder and in a bucket of a real S3 server."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from layout_support import COUNT, FAILED, LAYOUTS, ROWS, Layout, features, open_layout, write_layout
from place_support import BUCKET, s3, s3_server
from store_support import DOCS, decoding, record

from olaschema.errors import DamagedStoreError, OlaError, StoreError

__all__ = ["s3", "s3_server"]

KEYS = [f"{row:04d}.jpg" for row in range(COUNT)]


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "features")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{uuid4().hex}/features"


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> Layout:
    write_layout(request.param, url, tmp_path)
    return open_layout(request.param, url)


def again(layout: Layout) -> Layout:
    return type(layout)(layout.place.url)


class TestLayout:
    """What features promise to whoever reads them, however they are laid out and wherever."""

    def test_all_planned_images_are_listed_in_the_order_of_the_plan(self, layout: Layout) -> None:
        assert layout.keys() == KEYS

    def test_teachers_and_what_is_recorded_of_them(self, layout: Layout) -> None:
        wanted = [record(), record("int4", teacher="gen", grid=None, channels=70)]
        assert layout.teachers() == {each.fingerprint.teacher: each for each in wanted}

    def test_features_decode_as_documented_within_their_bound(self, layout: Layout) -> None:
        for teacher, precision, bound in (("depth", "float16", 2.0**-11), ("gen", "int4", (1 + 2.0**-9) / 14)):
            exact = features(teacher)
            decode = decoding(DOCS, precision)
            for row in (0, 2, 3) if teacher == "gen" else (0, 2, 3, 4, 6):
                found = decode(**layout.read(KEYS[row], teacher).arrays, channels=exact.shape[-1])
                assert found.shape == exact[row].shape
                largest = np.abs(exact[row]) if teacher == "depth" else np.abs(exact[row]).max()
                assert (np.abs(found - exact[row]) <= largest * bound + 2.0**-25).all(), (teacher, row)

    def test_missing_features_are_told_and_never_read(self, layout: Layout) -> None:
        ok = layout.status(KEYS[0], "depth")
        failed = layout.status(KEYS[FAILED], "depth")
        assert ok is not None
        assert failed is not None
        assert (ok.status, failed.status, failed.reason) == ("ok", "failed", "truncated")
        assert layout.status(KEYS[ROWS], "gen") is None  # not extracted
        for key, teacher in ((KEYS[FAILED], "depth"), (KEYS[ROWS], "gen")):
            with pytest.raises(StoreError, match=f"has no {teacher} feature"):
                layout.read(key, teacher)

    def test_statistics_are_those_of_all_features(self, layout: Layout) -> None:
        for teacher, rows in (("depth", [row for row in range(COUNT) if row != FAILED]), ("gen", range(ROWS))):
            tokens = features(teacher)[list(rows)]
            tokens = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
            found = layout.statistics(teacher)
            assert found.count == len(tokens)
            np.testing.assert_allclose(found.mean, tokens.mean(0), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found.m2, ((tokens - tokens.mean(0)) ** 2).sum(0), rtol=1e-9)
            np.testing.assert_array_equal(found.minimum, tokens.min(0))
            np.testing.assert_array_equal(found.maximum, tokens.max(0))

    def test_a_damaged_feature_is_named_by_the_read_that_uses_it(self, layout: Layout) -> None:
        name = layout.file(KEYS[5])
        data = layout.place.read(name)
        layout.place.publish(name, bytes(len(data)))
        with pytest.raises(DamagedStoreError, match=name):
            again(layout).read(KEYS[5], "depth")
        layout.place.publish(name, data)
        again(layout).read(KEYS[5], "depth")

    def test_a_flipped_bit_or_a_lost_end_of_any_file_is_named_by_verify(self, layout: Layout) -> None:
        assert layout.verify() == []
        rng = np.random.default_rng(0)
        for name in list(layout.place.walk()):
            data = layout.place.read(name)
            flipped = bytearray(data)
            flipped[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            for damaged in (bytes(flipped), data[: int(rng.integers(len(data)))]):
                layout.place.publish(name, damaged)
                assert _named(layout, name), name
            layout.place.publish(name, data)
        assert again(layout).verify() == []


def _named(layout: Layout, name: str) -> bool:
    """Whether the damaged file is named: by `verify`, or by what keeps the layout from being opened."""
    try:
        return name in again(layout).verify()
    except OlaError as error:
        return name in error.problem
