from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from olaschema.config import load_config
from olaschema.errors import ConfigError
from olaschema.manifest import Frozen


class Inner(Frozen):
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


class Config(Frozen):
    out: str
    steps: int = 10
    optimiser: Inner = Inner()
    groups: dict[str, Inner] = Field(default_factory=dict)
    schedule: Inner | None = None


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("out: from-file\nsteps: 1\noptimiser: {lr: 1.0}\n")
    config = load_config(
        Config,
        file=file,
        flags={"steps": 2, "out": None},
        overrides=["optimiser.lr=1e-3", "optimiser.betas=[0.5, 0.6]"],
    )
    assert config == Config(out="from-file", steps=2, optimiser=Inner(lr=1e-3, betas=(0.5, 0.6)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=a", "step=3"], "unknown setting step (did you mean steps?)"),
        (["out=a", "optimiser.lr=fast"], "optimiser.lr = 'fast'"),
        (["out=a", "optimiser.beta=1"], "unknown setting optimiser.beta (did you mean betas?)"),
        (["out=a", "groups.projector.beta=1"], "unknown setting groups.projector.beta (did you mean betas?)"),
        (["out=a", "schedule.beta=1"], "unknown setting schedule.beta (did you mean betas?)"),
        (["steps=1"], "the setting out is missing"),
        (["out"], "--set 'out' is not of the form name=value"),
        (["out=a", "out.b=1"], "out is a single value"),
        (["out=[", "steps=1"], "the value cannot be read"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, overrides=overrides)
    assert message in caught.value.problem


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "a: ["), ("a.json", "{"), ("a.yaml", "- 1")])
def test_unreadable_files_are_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        load_config(Config, file=tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(Config, file=tmp_path / "nowhere.yaml")
