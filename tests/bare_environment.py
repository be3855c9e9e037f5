"""Virtual environments that hold some distributions and what they need, and nothing else.

The packages are those of the environment that the tests run in, linked and not installed again, which saves minutes.
What is left out cannot be imported, as after `pip install` into a fresh environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def make_environment(folder: Path, requirements: Iterable[str], *, packages: Sequence[Path] = ()) -> Path:
    """Make a virtual environment in `folder` and return its python; `packages` are folders of ours to link as well."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    linked = set[str]()
    for found in closure(requirements):
        for name in sorted({file.parts[0] for file in found.files or ()} - {"..", "__pycache__"} - linked):
            source = Path(str(found.locate_file(name)))
            # files put beside the packages by others than the distribution's own wheel
            if source.exists():
                (site / name).symlink_to(source)
                linked.add(name)
    for package in packages:
        (site / package.name).symlink_to(package)
    return python


def closure(requirements: Iterable[str]) -> list[Distribution]:
    """Return the installed distributions that `requirements` name, with all they require here."""
    waiting = [Requirement(text) for text in requirements]
    found: dict[str, Distribution] = {}
    seen = set[tuple[str, frozenset[str]]]()
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            present = distribution(wanted.name)
        except PackageNotFoundError as error:
            raise AssertionError(f"{wanted} is required and not installed") from error
        found[key[0]] = present
        for text in present.requires or ():
            needed = Requirement(text)
            extras = ["", *wanted.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return [found[name] for name in sorted(found)]


def run_in(
    python: Path, arguments: Sequence[str], *, cwd: Path, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run the environment's python without any of this process's paths."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "WORLD_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    assert python.parent != Path(sys.executable).parent
    return subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
        timeout=timeout,
    )
