"""What is known of a teacher without loading it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pipeline_support import DEPTH

import olaschema.manifest
from olapipe import load, remembered
from olapipe.config import ExtractConfig
from olapipe.teachers import registry


def config(tmp_path: Path, **more: object) -> ExtractConfig:
    given = {"corpus": tmp_path, "out": tmp_path / "s", "teachers": ("depth",)}
    return ExtractConfig.model_validate(given | {"checkpoints": {"depth": str(tmp_path / "depth")}} | more)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", 0.0)
    return shutil.copytree(DEPTH, tmp_path / "depth")


def test_a_mark_changes_with_whatever_a_record_follows_from(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(**more: object) -> str:
        return remembered.marks(config(tmp_path, **more))["depth"]

    first = mark()
    assert mark() == first
    assert mark(batch_size=3, device="cpu", workers=2) == first, "these are no part of what a feature means"
    found = {first, mark(preset="ola-vlm"), mark(compute_dtype="bfloat16"), mark(options={"depth": {"exif": "false"}})}
    (checkpoint / "more.safetensors").write_bytes(b"")
    found.add(mark())
    (checkpoint / "more.safetensors").rename(checkpoint / "other.safetensors")
    found.add(mark())
    monkeypatch.setattr(remembered, "libraries_of", lambda name: {"torch": "1"})
    found.add(mark())
    monkeypatch.setattr(remembered, "_code", lambda: "another version")
    found.add(mark())
    assert len(found) == 8


def test_a_mark_changes_with_the_code_that_loads_and_records(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes
    for changed in (load.__file__, registry.__file__, olaschema.manifest.__file__):
        before = remembered._code()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, changed=changed: read(path) + b"#" * (str(path) == changed))
            assert remembered._code() != before, changed


def test_what_is_not_known_for_certain_has_no_mark(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", 3600.0)
    assert remembered.marks(config(tmp_path)) == {}, "its files changed a moment ago"
    monkeypatch.setattr(remembered, "_SETTLED_SECONDS", 0.0)
    assert remembered.marks(config(tmp_path, checkpoints={})) == {}, "the published one is not on this machine"
    monkeypatch.setattr(remembered, "BUILT_IN", ())
    assert remembered.marks(config(tmp_path)) == {}, "another package's teacher may read anything"
