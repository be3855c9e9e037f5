"""docs/teachers.md says what the registry says, and `olapipe teachers` too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pipeline_support import olapipe

from olapipe.report import TEACHER_COLUMNS, teacher_cells
from olapipe.teachers import registry
from olapipe.teachers.base import Option
from olapipe.teachers.catalogue import BUILT_IN
from olapipe.teachers.info import TeacherInfo

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")


def table_after(heading: str) -> list[list[str]]:
    """Rows of the first table under a heading, its own heading row first."""
    section = TEXT.split(f"\n## {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert lines is not None, heading
    rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    return [row for row in rows if not set("".join(row)) <= set("-: ")]


def test_table_of_teachers_is_that_of_the_registry() -> None:
    expected = [list(TEACHER_COLUMNS), *(list(teacher_cells(info)) for info in BUILT_IN)]
    assert table_after("The teachers") == expected


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _row(name: str, option: Option) -> list[str]:
    values = [*map(_value, option.allowed), *filter(None, [option.form])]
    return [name, ", ".join(values), _value(option.default), _value(option.ola_vlm), option.about]


def test_table_of_options_is_that_of_the_registry() -> None:
    rows: dict[tuple[str, ...], list[str]] = {}
    for info in BUILT_IN:
        for name, option in info.all_options.items():
            rows.setdefault(tuple(_row(name, option)), []).append(info.name)
    found = {tuple(row[1:]): row[0] for row in table_after("Options and presets")[1:]}
    everyone = len(BUILT_IN)
    expected = {row: "all" if len(names) == everyone else ", ".join(names) for row, names in rows.items()}
    assert found == expected


def test_the_plugin_shown_is_the_example() -> None:
    code = (ROOT / "examples" / "plugin_teacher" / "colour_teacher.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in TEXT


def test_pictures_exist_and_are_small() -> None:
    named = re.findall(r"!\[[^]]+\]\((images/[^)]+)\)", TEXT)
    assert len(named) >= 3
    for name in named:
        assert (ROOT / "docs" / name).stat().st_size < 150_000


def test_cells_are_arithmetic_on_grid_and_channels() -> None:
    cells = dict(zip(TEACHER_COLUMNS, teacher_cells(registry.available()["depth"]), strict=True))
    assert cells["float32 per image"] == "2.2 MiB"  # 24 · 24 · 1024 · 4 = 2 359 296 bytes
    assert cells["float16 per image"] == "1.1 MiB"
    # 24 · 24 tokens of 1024 bytes or 512 bytes, and 16 float16 scales each; 1024 float16 offsets
    assert cells["int8 per image"] == "596.0 KiB"
    assert cells["int4 per image"] == "308.0 KiB"
    assert cells["licence"] == "CC-BY-NC-4.0"
    vector = dict(zip(TEACHER_COLUMNS, teacher_cells(registry.available()["gen"]), strict=True))
    assert (vector["grid"], vector["float16 per image"]) == ("one vector", "2.0 KiB")


def test_a_teacher_of_any_checkpoint_and_an_unusable_one_claim_nothing() -> None:
    anything = teacher_cells(registry.available()["hf"])
    assert "0" not in anything
    assert "0 bytes" not in anything
    broken = TeacherInfo(
        name="x", published="", licence="", about="", grid=None, channels=0, module="", problem="no GPU here"
    )
    cells = teacher_cells(broken)
    assert len(cells) == len(TEACHER_COLUMNS)
    assert cells[-1] == "cannot be used: no GPU here"


def test_the_command_shows_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = " ".join(olapipe("teachers").output.split())
    for word in ("depth", "CC-BY-NC-4.0", "24 × 24", "1536", "1.1 MiB", "2.2 MiB", "512.0 KiB"):
        assert word in shown
