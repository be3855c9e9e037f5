"""Settings from a file, flags and `--set a.b=c`, into a frozen model that refuses unknown keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError

from olaschema.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
StoreUrl = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A feature store: a folder, or an address such as `s3://bucket/prefix`, which as a path would lose a slash."""


def load_config(
    model: type[Model],
    *,
    file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Model:
    """Build a config from a YAML or JSON file, then flags (None means not given), then `a.b=c` overrides.

    Flag names may be dotted. Values of overrides are read as YAML, so `1e-3`, `true`, `[1, 2]` mean what they seem.
    Raises ConfigError naming the setting, the value and the constraint; unknown settings get a suggestion.
    """
    data = _read(file) if file else {}
    for name, value in (flags or {}).items():
        if value is not None:
            _put(data, name, value)
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise ConfigError(
                f"--set {text!r} is not of the form name=value", "Write for instance --set optimiser.lr=1e-3"
            )
        try:
            _put(data, name.strip(), _scalar(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: the value cannot be read: {error}", "Quote it as YAML.") from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            _explain(model, error),
            "See the command's --help; docs/settings.md lists every setting of `olatrain run` and `olapipe extract`.",
        ) from error


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:  # YAML 1.1 reads 1e-3 as text
            return float(value)
        except ValueError:
            return value
    return value


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "Give a YAML or JSON file with --config.") from error
    try:
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is not valid YAML or JSON: {error}", "Mend the file.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file} does not hold settings but a {type(data).__name__}", "Write name: value lines.")
    return data


def _put(data: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{name}: {part} is a single value, it has no settings inside", f"Set {part} itself.")
        data = inner
    data[last] = value


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            known = _known(model, item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
            lines.append(f"unknown setting {name} ({hint})")
        elif item["type"] == "missing":
            lines.append(f"the setting {name} is missing")
        else:
            said = str(item["msg"]).removeprefix("Value error, ")
            lines.append(f"{name} = {item['input']!r}: {said}" if name else said)
    return "; ".join(lines)


def _known(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the settings at a place: through nested models, and through the values of tables of models."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", None)
        current = _model_in(fields[str(part)].annotation if fields and str(part) in fields else current)
    return list(getattr(current, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    """Return the annotation itself, or of `dict[str, M]`, `M | None` the model M; a table stays one for its keys."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return annotation
    for argument in get_args(annotation):
        if isinstance(argument, type) and hasattr(argument, "model_fields"):
            return argument
    return None
