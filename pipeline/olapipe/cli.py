"""The command `olapipe`. Imports nothing heavy at start."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from olaschema.errors import ConfigError, OlaError

if TYPE_CHECKING:
    from olapipe.preview.page import Page

app = typer.Typer(
    name="olapipe",
    help="Run visual teachers over images and store their features.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_INTERRUPTED = 130


@app.command("extract")
def extract_command(
    # text, because a Path would turn s3://bucket into the folder s3:/bucket
    corpus: Annotated[str | None, typer.Argument(help="Folder of images, or LLaVA-style .json / .jsonl.")] = None,
    out: Annotated[str | None, typer.Option(help="Feature store to make or continue.")] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="Teacher to run; may be given several times.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(metavar="TEACHER=PATH_OR_ID", help="Its weights; published id by default.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder that the paths in a JSON corpus start from.")] = None,
    preset: Annotated[str | None, typer.Option(help="default, or ola-vlm for the published targets.")] = None,
    precision: Annotated[str | None, typer.Option(help="float16 (default), float32, int8 or int4.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Rows per shard of a new store (256).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass (8).")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes (one per GPU, else per CPU).")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Run the teachers through torch.compile.")] = None,
    max_megapixels: Annotated[float | None, typer.Option(help="Larger images are refused (100).")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default Ray is started here.")] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Encode shards with failed images again.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any setting, e.g. options.depth.pooling=last.")
    ] = None,
) -> None:
    """Extract features of all images of CORPUS. Run the same command again to continue or to add images.

    Images that cannot be used are listed with the reason and the rest goes on. Exit status: 0; 1 if a shard could not
    be finished or no image had a feature; 2 for unusable settings, corpus or teacher; 130 when stopped.
    """
    with _user_errors():
        from olapipe.config import ExtractConfig
        from olaschema.config import load_config

        flags: dict[str, Any] = {
            "corpus": corpus,
            "out": out,
            "teachers": teacher or None,
            "images": images,
            "preset": preset,
            "precision": precision,
            "shard_size": shard_size,
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
            "compile": compile,
            "max_megapixels": max_megapixels,
            "address": address,
            "retry_failed": retry_failed,
        }
        flags |= {f"checkpoints.{name}": value for name, value in _pairs(checkpoint or [], "--checkpoint")}
        settings = load_config(ExtractConfig, file=config, flags=flags, overrides=overrides or [])

        from olapipe.extract import extract
        from olapipe.progress import make_reporter
        from olapipe.report import print_summary, visible

        result = extract(settings, make_reporter())
        print_summary(_console(), result.store, result.summaries, result.rates)
        for lost in result.lost:
            _errors().print(
                f"shard {lost.shard} was given up after several attempts: {visible(lost.reason)}", markup=False
            )
        if result.lost:
            log = result.store.place.locate("_log/errors.log")
            _errors().print(f"details in {visible(log)}; run the same command to try again", markup=False)
        raise typer.Exit(result.exit_code)


@app.command("inspect")
def inspect_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    key: Annotated[str | None, typer.Argument(help="One image: its path relative to the image folder.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Save the image and its features as colours (PNG).")] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder, for --picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a feature store holds, or what it holds of one image."""
    with _user_errors():
        from olapipe import inspect
        from olaschema.store import FeatureStore

        if (picture is None) != (images is None):
            raise ConfigError("--picture and --images go together", "Give both, or neither.")
        if picture is not None and key is None:
            raise ConfigError("--picture needs the KEY of one image", "Give it after the store.")
        opened = FeatureStore.open(store)
        if key is None:
            inspect.show_store(_console(), opened, as_json=as_json)
            return
        found = inspect.find(opened, key)
        if picture is not None and images is not None:
            from olapipe.picture import save_picture

            save_picture(opened, found.sample, images, picture)
        inspect.show_image(_console(), found, as_json=as_json)


@app.command("verify")
def verify_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    teacher: Annotated[list[str] | None, typer.Option(help="Only this teacher's shards; several times.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Extract damaged shards again (needs --images).")] = False,
    live: Annotated[int, typer.Option(min=0, help="Compute this many random images again and compare.")] = 0,
    images: Annotated[Path | None, typer.Option(help="Image folder, for --repair and --live.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(metavar="TEACHER=PATH_OR_ID", help="Its weights; published id by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (default), cpu or cuda.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Worker processes of --repair.")] = None,
    seed: Annotated[int, typer.Option(help="Which random images --live takes.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Settings of extract, as they were given then.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every byte of a feature store, and name the damaged files, shards and rows.

    Exit status: 0 if nothing is wrong (shards that are not extracted yet are no damage) or all of it was repaired; 1
    for damage, stray files, or features that --live finds different; 2 for unusable settings.
    """
    with _user_errors():
        from olapipe.audit import Request, audit
        from olapipe.progress import make_reporter
        from olapipe.repair import Source

        checkpoints = dict(_pairs(checkpoint or [], "--checkpoint"))
        source = Source(images, checkpoints, tuple(overrides or ()), device, workers)
        request = Request(store, teacher or None, repair, live, seed, source)
        report = audit(request, make_reporter())
        report.show(_console(), as_json=as_json)
        raise typer.Exit(report.exit_code)


@app.command("drop")
def drop_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    teacher: Annotated[str, typer.Option(help="Teacher whose features are deleted.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete all features of a teacher. Run the same command again to finish an interrupted one."""
    with _user_errors():
        from olapipe.drop import drop
        from olapipe.report import size, summarise, visible
        from olaschema.store import FeatureStore

        opened = FeatureStore.open(store)
        if teacher in opened.teachers() and not yes:
            summary = summarise(opened, teacher)
            question = f"Delete {summary.ok} features of {teacher} ({size(summary.stored_bytes)}) from {store}?"
            _ask(visible(question))
        present = drop(opened, teacher)
        said = f"{teacher} is deleted" if present else "an interrupted deletion is finished"
        _console().print(visible(f"{store}: {said}"), markup=False, highlight=False, soft_wrap=True)


@app.command("forget")
def forget_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    key: Annotated[str, typer.Argument(help="The image: its path relative to the image folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete one image's features and name from the store, for good. Stop what is reading the store first."""
    with _user_errors():
        from olapipe.forget import forget
        from olapipe.report import visible
        from olaschema.store import FeatureStore

        opened = FeatureStore.open(store)
        if not yes:
            _ask(visible(f"Delete the features and the name of {key} from {store}?"))
        done = forget(opened, key)
        lines = [f"{key}: row {done.row} is blank in {', '.join(done.teachers) or 'no teacher'}; its name is gone"]
        lines += [f"the same image is still in the store as {twin}" for twin in done.twins]
        lines += [f"{log} holds the name in a message: delete that file" for log in done.logs]
        for line in lines:
            _console().print(visible(line), markup=False, highlight=False, soft_wrap=True)


@app.command("preview")
def preview_command(
    store: Annotated[str, typer.Argument(help="Feature store, of targets or of predictions.")],
    key: Annotated[str, typer.Argument(help="One image: its path relative to the image folder.")],
    images: Annotated[Path | None, typer.Option(help="Image folder: shows the image and the full teacher.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(metavar="TEACHER=PATH", help="Decodes that teacher's features.")
    ] = None,
    predictions: Annotated[str | None, typer.Option(help="Second store: predictions of the same features.")] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="Only this teacher; may be given several times.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Picture to write (PNG).")] = Path("preview.png"),
) -> None:
    """Decode the stored features of one image: depth and panoptic maps, drawings, PCA colours."""
    with _user_errors():
        from olapipe.preview.page import PreviewSettings, preview
        from olaschema.store import FeatureStore

        settings = PreviewSettings(images, dict(_pairs(checkpoint or [], "--checkpoint")), teacher or None, device)
        compared = FeatureStore.open(predictions) if predictions else None
        _finish(preview(FeatureStore.open(store), key, settings, compared), out)


@app.command("explain")
def explain_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    key: Annotated[str, typer.Argument(help="One image: its path relative to the image folder.")],
    images: Annotated[Path, typer.Option(help="Image folder.")],
    student: Annotated[Path | None, typer.Option(help="Folder of a student, for what it sees.")] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="Only this teacher; may be given several times.")] = None,
    out: Annotated[Path, typer.Option(help="Picture to write (PNG).")] = Path("explain.png"),
) -> None:
    """Show the pixels each teacher saw beside those the student sees, with every preprocessing step."""
    with _user_errors():
        from olapipe.explain import explain
        from olaschema.store import FeatureStore

        _finish(explain(FeatureStore.open(store), key, images, student=student, teachers=teacher or None), out)


@app.command("teachers")
def teachers_command() -> None:
    """List the teachers."""
    with _user_errors():
        from rich.table import Table
        from rich.text import Text

        from olapipe.report import TEACHER_COLUMNS, teacher_cells
        from olapipe.teachers import registry

        table = Table()
        for name, is_number in TEACHER_COLUMNS.items():
            table.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for info in registry.available().values():
            table.add_row(*map(Text, teacher_cells(info)))
        _console().print(table)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    app()


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except OlaError as error:
        from olapipe.report import print_error

        print_error(_errors(), error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _errors().print(
            "stopped; what was finished is kept. Run the same command again to go on.", style="bold", markup=False
        )
        raise typer.Exit(_INTERRUPTED) from None


def _finish(page: Page, out: Path) -> None:
    from olapipe.report import visible

    page.save(out)
    for line in [*page.lines, f"written: {out}"]:
        _console().print(visible(line), markup=False, highlight=False, soft_wrap=True)


def _pairs(texts: Sequence[str], flag: str) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name or not value:
            raise ConfigError(f"{flag} {text!r} is not of the form TEACHER=PATH_OR_ID", f"{flag} depth=FOLDER")
        pairs.append((name, value))
    return pairs


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("this deletes data and there is no terminal to ask at", "Say --yes.")
    typer.confirm(question, abort=True)


def _console() -> Console:
    # narrow pipes and files would wrap the tables
    return Console(width=None if sys.stdout.isatty() else 200)


def _errors() -> Console:
    return Console(stderr=True)
