"""The benchmark of fidelity runs, and what the docs say of int8 is what its committed results say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_it_runs_on_the_tiny_teachers(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, BENCHMARKS / "fidelity.py", "--kind", "tiny", "--fit", "8", "--score", "4", "--out", out]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = {line["precision"]: line for line in json.loads(out.read_text())["totals"]}
    # depth and seg have 576 tokens, of 48 and 96 channels in 1 and 2 groups; gen 32 channels
    values = 576 * (48 + 96) + 32
    assert lines["float16"]["raw_bytes"] == pytest.approx(2 * values, rel=1e-4)
    assert lines["int8"]["raw_bytes"] == pytest.approx(values + 2 * (576 * 3 + 1) + 2 * (48 + 96), rel=1e-4)
    assert lines["int8"]["gradient_error"] < 2e-3
    assert lines["float16"]["gradient_error"] < lines["bfloat16"]["gradient_error"]


def test_the_committed_results() -> None:
    found = json.loads((BENCHMARKS / "results" / "fidelity.json").read_text())
    lines = {(line["data"], line["precision"]): line for line in found["totals"]}
    for data in ("proxy 1.0", "proxy 1.5", "noise"):
        values = 576 * (1024 + 1536) + 1024
        assert lines[data, "float16"]["raw_bytes"] == pytest.approx(2 * values, rel=1e-4)
        assert lines[data, "int8"]["raw_bytes"] / lines[data, "float16"]["raw_bytes"] <= 0.52
        for aim in (0.01, 0.001):
            assert lines[data, f"klt {aim}"]["gradient_error"] <= aim
        assert lines[data, "int8"]["gradient_error"] <= 1e-3
        for line in found["results"]:
            if (line["data"], line["precision"]) == (data, "int8") and line["teacher"] != "gen":
                assert line["change"]["0.9"]["smooth_l1"] <= 1.1e-4
    assert lines["tiny", "int8"]["gradient_error"] <= 1e-3
    for line in found["outliers"]:
        errors = line["gradient_error"]
        assert min(errors, key=errors.__getitem__) == "mean" and errors["power of two"] > 2.5 * errors["mean"]
        assert errors["mean"] <= {"int8": 1.5e-4, "int4": 0.046}[line["precision"]]
    worst = [line["gradient_error"]["nothing"] for line in found["outliers"] if line["precision"] == "int8"]
    assert worst == pytest.approx([8.7e-4, 2.6e-3, 6.0e-3], rel=0.02)
    klt, int8 = lines["proxy 1.0", "klt 0.001"], lines["proxy 1.0", "int8"]
    assert klt["stored_bytes"] < 0.7 * int8["stored_bytes"]
    assert lines["proxy 1.0", "klt 0.01"]["gradient_error"] < lines["proxy 1.0", "int4"]["gradient_error"] / 16
