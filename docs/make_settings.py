"""Writes docs/settings.md from the classes that check the settings: `python docs/make_settings.py`."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from olapipe.config import ExtractConfig
from olatrain.config import TrainConfig

DOCS = Path(__file__).parent
HEAD = """# Settings

Every setting of `olatrain run` and `olapipe extract`, to be given in a file (`--config FILE`, YAML or JSON) or as
`--set NAME=VALUE`, `a.b` for what lies inside; many have flags of their own (`--help`). `--set` wins over a flag, which
wins over the file; an unknown name is refused. `olatrain probe` takes those of `olatrain run`. This page is made from
the code by `docs/make_settings.py`.
"""


def main() -> int:
    """Write the page; with `--check` say whether it is as it would be written."""
    page = DOCS / "settings.md"
    text = render()
    if "--check" in sys.argv[1:]:
        return 0 if page.read_text(encoding="utf-8") == text else 1
    page.write_text(text, encoding="utf-8", newline="\n")
    return 0


def render() -> str:
    """Return the page."""
    parts = [HEAD]
    for command, model in (("olatrain run", TrainConfig), ("olapipe extract", ExtractConfig)):
        parts += [f"## {command}\n", "| setting | default | what |", "|---|---|---|"]
        parts += [f"| `{name}` | {default} | {about} |" for name, default, about in _fields(model, "")]
        parts.append("")
    return "\n".join(parts)


def _fields(model: type[BaseModel], before: str) -> Iterator[tuple[str, str, str]]:
    about = _docstrings(model)
    for name, field in model.model_fields.items():
        models = (kind for kind in _kinds(field.annotation) if issubclass(kind, BaseModel))
        inner = next((kind for kind in models if kind.__module__ == model.__module__), None)
        words = _words(field.annotation)
        told = [about.get(name) or (inner.__doc__ if inner is not None else None), words and f"({words})"]
        default = "" if inner is not None else _default(field)
        yield f"{before}{name}", default, " ".join(" ".join(filter(None, told)).split()).replace("|", "\\|")
        if inner is not None:
            shape = get_origin(field.annotation)
            yield from _fields(inner, f"{before}{name}" + {dict: ".TEACHER.", tuple: "[]."}.get(shape, "."))


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return what stands below each field of a class."""
    (node,) = (each for each in ast.parse(inspect.getsource(model)).body if isinstance(each, ast.ClassDef))
    found = {}
    for field, following in pairwise(node.body):
        if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr) and isinstance(field.target, ast.Name):
            found[field.target.id] = str(ast.literal_eval(following.value))
    return found


def _kinds(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _words(annotation: Any) -> str:
    """Name the words that a setting may be, where its type lists them."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(annotation))
    return ", ".join(filter(None, map(_words, get_args(annotation))))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)  # type: ignore[call-overload]
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        value = f"[{', '.join(map(str, value))}]"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    sys.exit(main())
