from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from store_support import fingerprint

from olaschema.config import load_config
from olaschema.errors import ConfigError
from olatrain.cli import _layers
from olatrain.config import TrainConfig, changed_settings
from olatrain.train import learning_rate


def given(**changes: Any) -> dict[str, Any]:
    paths = {name: f"/nowhere/{name}" for name in ("student", "store", "conversations", "images", "out")}
    return {**paths, "teachers": {"depth": {"layers": [2]}}, **changes}


def build(**changes: Any) -> TrainConfig:
    return load_config(TrainConfig, flags=given(**changes))


def test_the_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = build(fingerprints={"depth": fingerprint().model_dump(mode="json")}, steps=3, evaluation=None)
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    assert load_config(TrainConfig, file=file) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1}, r"unknown setting learning_rate"),
        ({"teachers": {"depth": {"layers": [2], "wieght": 1}}}, r"unknown setting teachers\.depth\.wieght"),
        ({"teachers": {}}, "teachers"),
        ({"teachers": {"depth": {"layers": [0]}}}, "counted from 1"),
        ({"teachers": {"depth": {"layers": [2, 2]}}}, "each named once"),
        ({"teachers": {"mine": {}}}, r"teachers\.mine\.layers is missing"),
        ({"epochs": 1, "steps": 2}, "epochs or steps, not both"),
        ({"batch": 2, "nproc": 3}, "batch of 2 cannot be split over 3 ranks"),
        ({"steps": 2, "stop_after": 3}, "beyond the 2 steps"),
        ({"compat": "ola", "context": "image"}, "only there the public code lets padding in"),
        ({"fingerprints": {"seg": fingerprint("seg").model_dump(mode="json")}}, "seg, which teachers and feed do not"),
        ({"warmup": 1.0}, "warmup"),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_contradictions_are_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_a_published_teacher_needs_no_layers() -> None:
    config = build(teachers={"depth": {"weight": 1.0}, "seg": None, "gen": {}})
    assert {name: teacher.layers for name, teacher in config.teachers.items()} == {
        "depth": (18, 20),
        "seg": (10, 18),
        "gen": (12, 20),
    }


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="student = /nowhere/student: no such folder"):
        build().require_inputs()
    folders = {name: str(tmp_path) for name in ("student", "store", "images", "out")}
    with pytest.raises(ConfigError, match="conversations = /nowhere/conversations: no such file"):
        build(**folders).require_inputs()


def test_only_what_changes_the_result_is_a_change() -> None:
    before = build(steps=4)
    same = build(steps=4, workers=7, nproc=2, micro_batch=1, checkpoint_every=9, out="/elsewhere", store="/moved")
    assert changed_settings(before, same) == []
    changed = changed_settings(before, build(steps=8, lr=0.5))
    assert changed == ["steps: 4 → 8", "lr: 0.001 → 0.5"]
    assert changed_settings(before, build(steps=4, mean_map_rows=9)) == []
    # where the mean map is what is learned, what it is made of is no matter of reporting
    mean = {"steps": 4, "target_control": "mean"}
    assert changed_settings(build(**mean), build(**mean, mean_map_rows=9)) == ["mean_map_rows: 2048 → 9"]


def test_layers_flags() -> None:
    assert _layers(["depth=18,20", "gen=3"]) == {"teachers.depth.layers": [18, 20], "teachers.gen.layers": [3]}
    for wrong in ("depth", "=3", "depth=a", "depth=1-3", "depth="):
        with pytest.raises(ConfigError, match="not of the form"):
            _layers([wrong])


def test_learning_rate_rises_over_the_warm_up_and_falls_to_zero() -> None:
    config = build(lr=2.0, warmup=0.1, steps=100)
    assert [learning_rate(config, step, 100) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate(config, 55, 100) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert 0 < learning_rate(config, 99, 100) < 0.001


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom olatrain.cli import app\n"
        "try:\n app(['run', '--help'])\nexcept SystemExit as e:\n assert not e.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'olapipe', 'ray'} & set(sys.modules), sorted(sys.modules)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    for flag in ("--config", "--set", "--nproc", "--allow-view-mismatch", "--layers", "--heldout"):
        assert flag in done.stdout
    assert took < 5  # a second alone; other processes may hold the cores


def test_the_command_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "olatrain", "run", "--student", str(tmp_path), "--set", "teachers.depth.layers=[1]",
         "--set", "nonsense=1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "unknown setting nonsense" in done.stderr
    assert "the setting out is missing" in done.stderr
    assert "Traceback" not in done.stderr
