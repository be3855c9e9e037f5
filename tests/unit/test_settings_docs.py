"""docs/settings.md lists every setting as the code checks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from olapipe.config import ExtractConfig
from olatrain.config import TrainConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_script_writes() -> None:
    done = subprocess.run([sys.executable, DOCS / "make_settings.py", "--check"], check=False)
    assert done.returncode == 0, "python docs/make_settings.py writes it"


def test_every_setting_is_there_with_words_about_it() -> None:
    rows = [
        [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        for line in (DOCS / "settings.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    names = [row[0].strip("`") for row in rows]
    assert {name for name in names if "." not in name} == {*TrainConfig.model_fields, *ExtractConfig.model_fields}
    assert {"teachers.TEACHER.layer_weights", "sources[].repeats", "lora.alpha", "evaluation.every"} <= set(names)
    assert [row[0] for row in rows if len(row[2]) < 10] == []
