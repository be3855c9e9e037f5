"""What would be made inside a store is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_support import olapipe
from store_support import make_store

from olaschema.errors import StoreError
from olaschema.nesting import require_outside_stores
from olaschema.store import FeatureStore


def test_nothing_is_made_inside_a_store(tmp_path: Path) -> None:
    store, _, _ = make_store(tmp_path / "s", count=3)
    before = sorted(store.place.walk())
    (tmp_path / "link").symlink_to(tmp_path / "s" / "depth")
    for inside in (tmp_path / "s" / "x", tmp_path / "s" / "depth" / "deep" / "x", tmp_path / "link" / "x"):
        with pytest.raises(StoreError, match="lies inside the feature store"):
            require_outside_stores(inside)
        with pytest.raises(StoreError, match="lies inside the feature store"):
            FeatureStore.create(inside)
        assert olapipe("copy", tmp_path / "s", inside).exit_code == 1
        assert olapipe("merge", tmp_path / "s", tmp_path / "s", "--out", inside).exit_code == 1
    assert sorted(store.place.walk()) == before
    (tmp_path / "zarr.json").write_text('{"attributes": {"other": 1}}')  # a Zarr group of somebody else
    require_outside_stores(tmp_path / "new")
    require_outside_stores(tmp_path / "s")


def test_a_teacher_is_no_path(tmp_path: Path) -> None:
    make_store(tmp_path / "other", count=3)
    make_store(tmp_path / "s", count=3)
    for name in ("../other/depth", ""):
        result = olapipe("drop", tmp_path / "s", "--teacher", name, "--yes")
        assert (result.exit_code, "has no features of the teacher" in result.stderr) == (1, True)
