"""The command `olapipe`. Imports nothing heavy at start."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from olapipe.signals import Terminated, sigterm_raises
from olaschema.errors import ConfigError, OlaError

if TYPE_CHECKING:
    from olapipe.pack import Packed
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
_TERMINATED = 143
_GO_ON = "stopped; what was finished is kept. Run the same command again to go on."


@app.command("extract")
def extract_command(
    # text, because a Path would turn s3://bucket into the folder s3:/bucket
    corpus: Annotated[
        str | None, typer.Argument(help="Folder of images, tar or parquet files; or LLaVA-style .json / .jsonl.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Feature store to make or continue: a folder, or s3://BUCKET/PREFIX.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(metavar="zarr|webdataset", help="webdataset: packed training shards at once, as by pack."),
    ] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="Teacher to run; may be given several times.")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(metavar="TEACHER=PATH_OR_ID", help="Its weights; published id by default.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder that the paths in a JSON corpus start from.")] = None,
    preset: Annotated[str | None, typer.Option(help="default, or ola-vlm for the published targets.")] = None,
    precision: Annotated[str | None, typer.Option(help="float16 (default), float32, int8, int4, klt or auto.")] = None,
    max_gradient_error: Annotated[
        float | None, typer.Option(help="What --precision auto and klt may change of a gradient (0.01).")
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="Rows per shard of a new store (256).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass (8).")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes (one per GPU, else per CPU).")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Run the teachers through torch.compile.")] = None,
    max_megapixels: Annotated[float | None, typer.Option(help="Larger images are refused (100).")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; by default Ray is started here.")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="Part of a GPU for each worker (1).")] = None,
    max_failures: Annotated[
        str | None, typer.Option(metavar="N|P%", help="Stop when more images fail: a number, or a share as 5%.")
    ] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Encode shards with failed images again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print which shards would be extracted.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any setting, e.g. options.depth.pooling=last.")
    ] = None,
) -> None:
    """Extract features of all images of CORPUS. Run the same command again to continue or to add images.

    Images that cannot be used are listed with the reason and the rest goes on. Exit status: 0; 1 if a shard could not
    be finished or no image had a feature; 2 for unusable settings, corpus or teacher; 3 when --max-failures stopped it;
    130 or 143 when Ctrl-C or SIGTERM did.
    """
    with _user_errors():
        from olapipe.config import ExtractConfig
        from olaschema.config import load_config

        flags: dict[str, Any] = {
            "corpus": corpus,
            "out": out,
            "format": format,
            "teachers": teacher or None,
            "images": images,
            "preset": preset,
            "precision": precision,
            "max_gradient_error": max_gradient_error,
            "shard_size": shard_size,
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
            "compile": compile,
            "max_megapixels": max_megapixels,
            "address": address,
            "gpus_per_worker": gpus_per_worker,
            "max_failures": max_failures,
            "retry_failed": retry_failed,
        }
        flags |= {f"checkpoints.{name}": value for name, value in _pairs(checkpoint or [], "--checkpoint")}
        settings = load_config(ExtractConfig, file=config, flags=flags, overrides=overrides or [])

        from olapipe.extract import extract, plan_only
        from olapipe.progress import make_reporter
        from olapipe.report import print_job, print_summary, visible

        if dry_run:
            plan_only(settings, make_reporter()).show(_console())
            return
        with sigterm_raises():
            result = extract(settings, make_reporter())
        print_summary(_console(), result.store, result.summaries, result.rates)
        if result.tally is not None:
            print_job(_console(), result.tally, result.bottleneck)
        if result.packed is not None:
            _show_packed(settings.out, result.packed)
        if result.lost:
            log = result.store.place.locate("_log/errors.log")
            _errors().print(f"details in {visible(log)}; run the same command to try again", markup=False)
        if result.stopped == "max-failures":
            _errors().print(
                f"error: stopped, because more images failed than --max-failures {settings.max_failures} allows\n"
                "Look at the failures above; what was finished is kept. Run the same command again to go on.",
                markup=False,
            )
        elif result.stopped is not None:
            _errors().print(_GO_ON, style="bold", markup=False)
        raise typer.Exit(result.exit_code)


@app.command("plan")
def plan_command(
    corpus: Annotated[str, typer.Argument(help="Corpus, as for extract.")],
    teacher: Annotated[list[str], typer.Option(help="Teacher to run; may be given several times.")],
    checkpoint: Annotated[
        list[str] | None, typer.Option(metavar="TEACHER=PATH_OR_ID", help="Its weights; published id by default.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Folder that the paths in a JSON corpus start from.")] = None,
    precision: Annotated[str | None, typer.Option(help="As for extract.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass (8).")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes of a node.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any setting of extract.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Machines like this one.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of a training run.")] = 1,
    runs: Annotated[int, typer.Option(help="Training runs that use the features.")] = 1,
    price_hour: Annotated[float | None, typer.Option(min=0, help="Price of a node per hour; none by default.")] = None,
    price_tb_month: Annotated[
        float | None, typer.Option(min=0, help="Price of 10^12 bytes per month; none by default.")
    ] = None,
    months: Annotated[float, typer.Option(min=0, help="How long the features are kept.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="How long the sample may take, about.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this machine on a sample; tell time, size, cost, licences, and whether caching pays."""
    with _user_errors():
        from olapipe.config import ExtractConfig
        from olapipe.plan import Assumptions, make_plan
        from olaschema.config import load_config

        flags: dict[str, Any] = {
            "corpus": corpus,
            "out": "unused",  # the sample goes to a temporary folder
            "teachers": teacher,
            "images": images,
            "precision": precision,
            "batch_size": batch_size,
            "workers": workers,
            "device": device,
        }
        flags |= {f"checkpoints.{name}": value for name, value in _pairs(checkpoint or [], "--checkpoint")}
        settings = load_config(ExtractConfig, flags=flags, overrides=overrides or [])
        given = Assumptions(nodes, epochs, runs, price_hour, price_tb_month, months, seconds)
        with sigterm_raises():  # its workers and its sample go with it
            plan = make_plan(settings, given)
        plan.show(_console(), as_json=as_json)


@app.command("inspect")
def inspect_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    key: Annotated[str | None, typer.Argument(help="One image: its path relative to the image folder.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Save the image and its features as colours (PNG).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write all of it as one page with a gallery and a search.")] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder, for --picture and --html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a feature store holds, or what it holds of one image."""
    with _user_errors():
        from olapipe import inspect
        from olaschema.packed import PackedSet, is_packed
        from olaschema.store import FeatureStore

        if is_packed(store):
            if key is not None or picture is not None or html is not None or images is not None:
                raise ConfigError(
                    f"{store} is a packed training set: images are looked up in its store",
                    "Leave out KEY, --picture, --html and --images.",
                )
            inspect.show_packed(_console(), PackedSet.open(store), as_json=as_json)
            return

        if html is None and (picture is None) != (images is None):
            raise ConfigError("--picture and --images go together", "Give both, or neither.")
        if html is not None and (key is not None or picture is not None or as_json):
            raise ConfigError("--html shows the whole store", "Leave out KEY, --picture and --json.")
        if html is not None and images is not None and not images.is_dir():
            raise ConfigError(f"--images {images}: no such folder", "Give the folder that keys start from.")
        if picture is not None and key is None:
            raise ConfigError("--picture needs the KEY of one image", "Give it after the store.")
        opened = FeatureStore.open(store)
        if html is not None:
            from olapipe.report import visible
            from olapipe.webpage import write_page

            write_page(opened, images, html)
            _console().print(visible(f"written: {html}"), markup=False, highlight=False, soft_wrap=True)
            return
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
    for damage, stray files, features that --repair could not bring back or --live finds different; 2 for unusable
    settings.
    """
    with _user_errors():
        from olaschema.packed import is_packed

        if is_packed(store):
            _verify_packed(
                store,
                given=bool(
                    teacher
                    or repair
                    or live
                    or images
                    or checkpoint
                    or overrides
                    or workers
                    or seed
                    or device != "auto"
                ),
                as_json=as_json,
            )
        from olapipe.audit import Request, audit
        from olapipe.progress import make_reporter
        from olapipe.repair import Source

        told = {
            "--images": images,
            "--checkpoint": checkpoint,
            "--set": overrides,
            "--device": None if device == "auto" else device,
        }
        _refuse(told, "--repair and --live", used=repair or live > 0)
        _refuse({"--workers": workers}, "--repair", used=repair)
        _refuse({"--seed": seed or None}, "--live", used=live > 0)
        checkpoints = dict(_pairs(checkpoint or [], "--checkpoint"))
        source = Source(images, checkpoints, tuple(overrides or ()), device, workers)
        request = Request(store, teacher or None, repair, live, seed, source)
        report = audit(request, make_reporter())
        report.show(_console(), as_json=as_json)
        raise typer.Exit(report.exit_code)


@app.command("fidelity")
def fidelity_command(
    source: Annotated[str, typer.Argument(help="Corpus, or feature store of float32 or float16 features.")],
    teacher: Annotated[str, typer.Option(help="Teacher whose features are measured.")],
    checkpoint: Annotated[str | None, typer.Option(help="Its weights; published id by default.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that the paths in a JSON corpus start from.")] = None,
    preset: Annotated[str | None, typer.Option(help="default, or ola-vlm for the published targets.")] = None,
    samples: Annotated[int, typer.Option(min=8, help="Images, half of which are scored.")] = 64,
    max_gradient_error: Annotated[float, typer.Option(help="What klt is fitted to.")] = 0.01,
    device: Annotated[str, typer.Option(help="auto (default), cpu or cuda.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Rate-distortion plot to write (PNG, SVG, PDF).")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Settings of extract.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what each precision costs: bytes per image, and the change to losses and gradients in training."""
    with _user_errors():
        from olapipe.compare_tiers import Request, compare_tiers
        from olapipe.fidelity import plot as draw
        from olapipe.fidelity import require_plot, show

        if plot is not None:
            require_plot(plot)
        request = Request(
            source, teacher, checkpoint, images, preset, samples, max_gradient_error, device, tuple(overrides or ())
        )
        found = compare_tiers(request)
        if plot is not None:
            draw(plot, found.title, found.figures)
        if as_json:
            typer.echo(json.dumps(found.to_json()))
        else:
            show(_console(), found.title, found.figures, found.notes)


@app.command("pack")
def pack_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    images: Annotated[Path, typer.Option(help="Folder that the paths of the images start from.")],
    out: Annotated[str, typer.Option(help="Folder of the shards to make or continue.")],
    conversations: Annotated[
        Path | None, typer.Option(help="LLaVA-style .json or .jsonl; without it each image is a sample.")
    ] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="Only this teacher's features; several times.")] = None,
    samples_per_tar: Annotated[
        int | None, typer.Option(help="Samples of a tar; by default a tar holds the images of one shard of the store.")
    ] = None,
) -> None:
    """Write features, images and conversations as WebDataset shards. Run the same command again to continue."""
    with _user_errors():
        from olapipe.pack import PackSettings, pack

        settings = PackSettings(store, conversations, images, out, tuple(teacher) if teacher else None, samples_per_tar)
        _show_packed(out, pack(settings))


@app.command("drop")
def drop_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    teacher: Annotated[str, typer.Option(help="Teacher whose features are deleted.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete all features of a teacher. Run the same command again to finish an interrupted one."""
    with _user_errors():
        from olapipe.drop import drop
        from olapipe.progress import make_reporter
        from olapipe.report import size, summarise, visible
        from olaschema.store import FeatureStore

        opened = FeatureStore.open(store)
        if teacher in opened.teachers() and not yes:
            summary = summarise(opened, teacher)
            question = f"Delete {summary.ok} features of {teacher} ({size(summary.stored_bytes)}) from {store}?"
            _ask(visible(question))
        present = drop(opened, teacher, say=make_reporter().say)
        said = f"{teacher} is deleted" if present else "an interrupted deletion is finished"
        _console().print(visible(f"{store}: {said}"), markup=False, highlight=False, soft_wrap=True)


@app.command("status")
def status_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far the jobs on a store are: from any machine that can read it."""
    with _user_errors():
        from olapipe.status import show_status
        from olaschema.store import FeatureStore

        show_status(_console(), FeatureStore.open(store), as_json=as_json)


@app.command("forget")
def forget_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    key: Annotated[str, typer.Argument(help="The image: its path relative to the image folder.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete one image's features and name from the store, for good. Stop what is reading the store first."""
    with _user_errors():
        from olapipe.forget import forget
        from olapipe.progress import make_reporter
        from olapipe.report import visible
        from olaschema.store import FeatureStore

        opened = FeatureStore.open(store)
        if not yes:
            _ask(visible(f"Delete the features and the name of {key} from {store}?"))
        done = forget(opened, key, say=make_reporter().say)
        lines = [f"{key}: row {done.row} is blank in {', '.join(done.teachers) or 'no teacher'}; its name is gone"]
        lines += [f"the same image is still in the store as {twin}" for twin in done.twins]
        lines += [f"{log} holds the name in a message: delete that file" for log in done.logs]
        for line in lines:
            _console().print(visible(line), markup=False, highlight=False, soft_wrap=True)


@app.command("copy")
def copy_command(
    store: Annotated[str, typer.Argument(help="Feature store.")],
    out: Annotated[str, typer.Argument(help="New place.")],
) -> None:
    """Copy a store to another place, and verify the copy. Run the same command again to finish an interrupted one."""
    with _user_errors():
        from olapipe.copy import copy
        from olapipe.progress import make_reporter
        from olapipe.report import size, visible
        from olaschema.store import FeatureStore

        done = copy(FeatureStore.open(store), out, make_reporter())
        before = f", {done.present} of them were there already" if done.present else ""
        _say(visible(f"{out}: {done.files} files, {size(done.bytes)}{before}; verified"))


@app.command("merge")
def merge_command(
    stores: Annotated[list[str], typer.Argument(help="Feature stores, two or more; the first one's rows come first.")],
    out: Annotated[str, typer.Option(help="New place.")],
) -> None:
    """Write one store of the images and features of several, and verify it. A rerun finishes an interrupted one.

    Images are joined by key. The same key with other bytes is refused, as are features that differ in meaning or
    precision. What one store has forgotten, the result has forgotten.
    """
    with _user_errors():
        from olapipe.merge import merge
        from olapipe.progress import make_reporter
        from olapipe.report import visible
        from olaschema.store import FeatureStore

        if len(stores) < 2:
            raise ConfigError(
                "there is nothing to merge a single store with", "Give two stores, or use `olapipe copy`."
            )
        done = merge([FeatureStore.open(store) for store in stores], out, make_reporter())
        counts = f"{done.images} images, {done.repeated} of them repeated, {done.forgotten} forgotten"
        _say(visible(f"{out}: {counts}; {done.taken} shards as they were, {done.rebuilt} put together; verified"))
        for teacher, features in done.left.items():
            _say(
                f"{teacher}: {features} features are left out, because other images of their shards are not extracted: "
                "`olapipe extract` over all images fills them in"
            )


@app.command("dedup")
def dedup_command(store: Annotated[str, typer.Argument(help="Feature store.")]) -> None:
    """Let images of the same bytes share one row. A rerun finishes an interrupted pass.

    Stop what is reading the store first.
    """
    with _user_errors():
        from olapipe.dedup import dedup
        from olapipe.progress import make_reporter
        from olapipe.report import size
        from olaschema.store import FeatureStore

        for teacher, done in dedup(FeatureStore.open(store), make_reporter()).items():
            before = f" ({done.already} did before)" if done.already else ""
            _say(f"{teacher}: {done.rows} rows share another one{before}; {size(max(done.bytes, 0))} given back")


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
    except Terminated:
        _errors().print(_GO_ON, style="bold", markup=False)
        raise typer.Exit(_TERMINATED) from None
    except KeyboardInterrupt:
        _errors().print(_GO_ON, style="bold", markup=False)
        raise typer.Exit(_INTERRUPTED) from None


def _show_packed(out: str, done: Packed) -> None:
    from olapipe.report import visible

    record = done.record
    lines = [f"{out}: {record.conversations} conversations in {record.samples} samples, {len(record.tars)} tars"]
    lines[0] += f", {done.made} of them written now"
    for name, missing in done.missing.items():
        shown = ", ".join(f"{count} {reason}" for reason, count in missing.items())
        lines += [f"{name}: images without a feature: {shown}"] if missing else []
    shown = ", ".join(f"{count} {reason}" for reason, count in record.left_out.items())
    lines += [f"left out (the indices say what): {shown}"] if shown else []
    for line in lines:
        _console().print(visible(line), markup=False, highlight=False, soft_wrap=True)


def _verify_packed(where: str, *, given: bool, as_json: bool) -> NoReturn:
    from olapipe.report import visible
    from olapipe.verify_packed import verify_packed
    from olaschema.packed import PackedSet

    if given:
        raise ConfigError(
            f"{where} is a packed training set: it is checked as a whole", "Leave out all flags but --json."
        )
    packed = PackedSet.open(where)
    problems = verify_packed(packed)
    if as_json:
        sys.stdout.write(json.dumps([{"file": name, "problem": text} for name, text in problems], indent=1) + "\n")
    else:
        for name, text in problems:
            _console().print(visible(f"damaged: {name}: {text}"), markup=False, highlight=False, soft_wrap=True)
        if not problems:
            said = f"{where}: {len(packed.record.tars)} tars, every byte is as it was written"
            _console().print(visible(said), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if problems else 0)


def _say(line: str) -> None:
    _console().print(line, markup=False, highlight=False, soft_wrap=True)


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


def _refuse(told: Mapping[str, object], wanted: str, *, used: bool) -> None:
    """Raise ConfigError for a flag that was given where nothing uses it."""
    given = [flag for flag, value in told.items() if value is not None]
    if given and not used:
        raise ConfigError(f"{', '.join(given)}: nothing but {wanted} uses this", f"Leave it out, or add {wanted}.")


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("this deletes data and there is no terminal to ask at", "Say --yes.")
    typer.confirm(question, abort=True)


def _console() -> Console:
    # narrow pipes and files would wrap the tables
    return Console(width=None if sys.stdout.isatty() else 200)


def _errors() -> Console:
    return Console(stderr=True)
