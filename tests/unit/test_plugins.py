"""Teachers of other packages: a real one is installed, and every way in which one can be unusable."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from olapipe.teachers import registry
from olapipe.teachers.base import TeacherSettings
from olaschema.errors import TeacherError

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin_teacher"
BUILT_IN = [
    "depth", "seg", "gen", "depth-map", "dinov2", "dinov3", "siglip", "clip", "sam", "internvit", "sd-vae", "sd-unet",
    "hf",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed by pip into a folder of its own, without a network."""
    source = tmp_path_factory.mktemp("source") / "plugin_teacher"  # pip builds in the source folder
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(installed), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


def test_the_example_has_thirty_lines() -> None:
    text = (EXAMPLE / "colour_teacher.py").read_text()
    docs = [
        node.body[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) - sum(doc.end_lineno - doc.lineno + 1 for doc in docs if doc.end_lineno) <= 30


def test_an_installed_plugin_is_listed_and_loads(installed: Path) -> None:
    code = """if True:
        import json, sys
        from olapipe.teachers import registry
        from olapipe.teachers.base import TeacherSettings
        listed = registry.available()
        light = [m for m in ("torch", "transformers") if m in sys.modules]
        teacher = registry.load("colour", TeacherSettings(options={"grid": "4", "grid_resize": "area"}))
        print(json.dumps([list(listed), listed["colour"].licence, light, teacher.fingerprint.shape, teacher.licence]))
    """
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[*BUILT_IN, "colour"], "CC0-1.0", [], [4, 4, 3], "CC0-1.0"]


def test_an_installed_plugin_extracts(installed: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    store = tmp_path / "features.zarr"
    done = run(installed, "-m", "olapipe", "extract", tmp_path / "images", "--out", store, "--teacher", "colour")
    assert done.returncode == 0, done.stdout + done.stderr
    means = (picture / 255).reshape(16, 4, 16, 4, 3).mean((1, 3))
    stored = zarr.open_group(store, mode="r")["colour/values"][0]
    np.testing.assert_allclose(stored, means, atol=1e-3)
    listed = run(installed, "-m", "olapipe", "teachers")
    assert listed.returncode == 0
    assert "colour" in listed.stdout
    assert "CC0-1.0" in listed.stdout


# ---- unusable ones: a module and its entry points, written as an installer would leave them


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, text: str, *points: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(text)
    metadata = folder / f"{module}-2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 2.0\n")
    (metadata / "entry_points.txt").write_text("[olapipe.teachers]\n" + "".join(f"{point}\n" for point in points))
    monkeypatch.syspath_prepend(folder)


INFO = (
    "from olapipe.teachers.info import TeacherInfo\n"
    "def make(name='odd'):\n"
    "    return TeacherInfo(name=name, published='x', licence='MIT', about='', grid=None, channels=1,\n"
    "                       module=__name__)\n"
)
UNUSABLE = {
    "missing": ("import no_such_package\n", "x:INFO", "cannot be imported: ModuleNotFoundError: No module named"),
    "broken": ("def f(:\n", "x:INFO", "cannot be imported: SyntaxError"),
    "raising": ("raise RuntimeError('no GPU here')\n", "x:INFO", "cannot be imported: RuntimeError: no GPU here"),
    "attribute": ("", "x:INFO", "cannot be imported: AttributeError"),
    "type": ("INFO = 3\n", "x:INFO", "cannot be imported: TypeError"),
    "result": ("def make():\n    return 3\n", "x:make", "gives a int, not a TeacherInfo"),
    "name": (INFO, "x:make", "calls its teacher 'odd': both names must be the same"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_plugin_is_noted_and_harms_no_other(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, value, message = UNUSABLE[kind]
    module = f"plugin_{kind}"
    plant(monkeypatch, tmp_path, module, text, f"mine = {value.replace('x:', f'{module}:')}")
    listed = registry.available()
    assert list(listed) == [*BUILT_IN, "mine"]
    assert message in listed["mine"].problem
    assert f"of {module} 2.0" in listed["mine"].problem
    with pytest.raises(TeacherError, match=message) as caught:
        registry.load("mine", TeacherSettings())
    assert "other teachers work" in caught.value.remedy
    assert not listed["depth"].problem
    with pytest.raises(TeacherError, match="no folder"):
        registry.load("depth", TeacherSettings("/no/such/folder"))


def test_a_callable_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, "plugin_callable", INFO, "odd = plugin_callable:make")
    assert registry.available()["odd"].module == "plugin_callable"


def test_a_builtin_name_is_refused_naming_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, "plugin_depth", INFO, "depth = plugin_depth:make")
    with pytest.raises(TeacherError, match=r"the built-in teacher and plugin_depth:make of plugin_depth 2\.0"):
        registry.load("depth", TeacherSettings())
    assert list(registry.available()) == BUILT_IN
    assert not registry.available()["seg"].problem


def test_two_plugins_of_one_name_are_refused_naming_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("plugin_b", "plugin_a"):
        plant(monkeypatch, tmp_path / module, module, INFO, f"odd = {module}:make")
    with pytest.raises(TeacherError, match=r"plugin_a:make of plugin_a 2\.0 and plugin_b:make of plugin_b 2\.0"):
        registry.load("odd", TeacherSettings())
