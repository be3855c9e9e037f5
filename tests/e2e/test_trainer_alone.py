"""`olatrain` in an environment with the base install and the `trainer` extra, and nothing of the other half."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from bare_environment import closure, make_environment, run_in
from trainer_support import make_corpus, make_student, metrics, settings, write_json

ROOT = Path(__file__).parents[2]
# One process for both commands: starting it is most of the time
BOTH = """
import sys
from importlib.util import find_spec

from olatrain.cli import main

config, out = sys.argv[1:]
assert find_spec("ray") is None and find_spec("diffusers") is None
for command in (["run", "--config", config], ["export", out, "--out", "model"]):
    sys.argv = ["olatrain", *command]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
banned = ("olapipe", "depth_anything", "oneformer")
found = [name for name in sys.modules if any(word in name for word in banned)]
assert "torch" in sys.modules and not found, found
"""


def test_training_and_export_need_the_trainer_extra_alone(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["trainer"]]
    names = {found.metadata["Name"].lower() for found in closure(requirements)}
    assert not names & {"ray", "diffusers", "scipy", "pytest", "matplotlib", "webdataset", "scikit-image"}
    # a wheel holds all three packages: what the other half imports is what must not be there
    packages = [ROOT / "schemas/olaschema", ROOT / "trainer/olatrain", ROOT / "pipeline/olapipe"]
    python = make_environment(tmp_path / "environment", requirements, packages=packages)
    corpus = make_corpus(tmp_path / "corpus", images=6, texts=1)
    student = make_student(tmp_path / "student")
    chosen = settings(corpus, student, tmp_path / "out", steps=2, trackers=["tensorboard"], workers=1)
    config = write_json(tmp_path / "run.json", chosen)
    ran = run_in(python, ["-c", BOTH, str(config), str(tmp_path / "out")], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == [1, 2]
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "llava"
