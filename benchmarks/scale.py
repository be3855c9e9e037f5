"""How long planning and resuming take, and how much memory, from 10 thousand to 10 million images.

Corpora are generated on disk: a JSONL of LLaVA-style conversations whose images are not there (each is looked for and
planned as missing), and tar files of 10 000 members as img2dataset writes them. No image is read and no teacher runs.
Each figure comes from a process of its own, so its peak is all that planning adds to a job; Ray and the teachers come
on top and do not grow with the corpus. Beside it stands the plain way: a dict of all keys in memory.

Resuming is measured on a store of 16 rows per shard with receipts for every shard.

`job` is the whole command, `olapipe extract` with Ray: the depth teacher of the tests on a JSONL of which only the
first images are there, until `--job-shards` shards are done (or it is stopped by hand); then Ctrl-C. Memory is that of
all its processes together, as PSS (a page that several share is counted once), looked at every second: `olapipe` is the
driver and the workers, which hold the teacher and torch; `ray` is everything else that Ray starts. `planning` is the
driver before Ray starts.

Seconds are of the clock; `processor` is the processor time of the whole process, which a busy machine does not change.
Run `python benchmarks/scale.py`; it writes benchmarks/results/scale.json and prints the tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scale.json"
WORDS = "word " * 40
MEMBERS = 10_000
ROWS = 64
CHECKPOINT = Path(__file__).parents[1] / "tests" / "golden" / "depth"


def write_jsonl(path: Path, images: int) -> None:
    with path.open("w") as file:
        for i in range(images):
            turns = f'[{{"from": "human", "value": "<image>\\nDescribe."}}, {{"from": "gpt", "value": "{WORDS}"}}]'
            file.write(f'{{"id": "{i}", "image": "train/{i // 1000:06d}/{i:012d}.jpg", "conversations": {turns}}}\n')


def write_tars(root: Path, images: int) -> None:
    root.mkdir()
    for first in range(0, images, MEMBERS):
        with (root / f"{first // MEMBERS:05d}.tar").open("wb") as file:
            for i in range(first, min(first + MEMBERS, images)):
                info = tarfile.TarInfo(f"{i:09d}.jpg")
                info.size = 512
                file.write(info.tobuf(tarfile.USTAR_FORMAT) + bytes(512))
            file.write(bytes(1024))


def plan(corpus: Path, images: Path | None, out: Path) -> dict[str, float]:
    from olapipe.corpus import compare, list_corpus
    from olaschema.store import FeatureStore

    seconds = {}
    start = time.perf_counter()
    listing = list_corpus(corpus, images)
    seconds["list"] = time.perf_counter() - start
    growth = compare(listing, None)
    store = FeatureStore.create(out)
    store.add_plan(growth.new.tables())
    seconds["plan"] = time.perf_counter() - start
    start = time.perf_counter()
    again = compare(listing, store)
    seconds["compare_again"] = time.perf_counter() - start
    key = next(iter(growth.new)).key
    last = f"{key.partition('/')[0]}/none.jpg"
    start = time.perf_counter()
    store.find({last})
    seconds["look_up_a_key"] = time.perf_counter() - start
    if len(again.new) or again.gone:
        raise SystemExit("planning again found something new")
    return seconds


def plain(corpus: Path, images: Path | None, out: Path) -> dict[str, float]:
    """The baseline: all keys in a dict."""
    start = time.perf_counter()
    found: dict[str, int] = {}
    with corpus.open() as file:
        for line in file:
            key = json.loads(line)["image"]
            if key not in found:
                path = (images or corpus) / key
                found[key] = path.stat().st_size if path.exists() else -1
    json.dump(list(found.items()), out.with_suffix(".json").open("w"))
    return {"plan": time.perf_counter() - start}


def resume(shards: int, root: Path) -> dict[str, float]:
    from olapipe.report import summarise
    from olapipe.tasks import Pending, Planned
    from olaschema.ledger import read_ledger
    from olaschema.store import FeatureStore

    store = FeatureStore.open(root)
    seconds = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds[name] = time.perf_counter() - start
        return found

    pending = timed("what_is_left", lambda: Pending(store, Planned.of(store), ["fake"]))
    if len(pending):
        raise SystemExit("something is left to do")
    timed("open_every_receipt", lambda: read_ledger(store, "fake", keep=True))
    timed("ledger", lambda: read_ledger(store, "fake"))
    summary = timed("summary", lambda: summarise(store, "fake", brief=True))
    if summary.committed != shards:
        raise SystemExit("receipts are missing")
    return seconds


def make_store(root: Path, shards: int) -> None:
    import numpy as np

    from olaschema.digest import sealed
    from olaschema.layout import receipt_file
    from olaschema.manifest import (
        ChannelStatistics,
        Execution,
        FileReceipt,
        Fingerprint,
        Preprocessing,
        Receipt,
        RowReceipt,
        SampleRow,
        TeacherRecord,
        View,
    )
    from olaschema.store import FeatureStore

    rows = 16
    store = FeatureStore.create(root, rows_per_shard=rows)
    store.add_generation(SampleRow(row=0, key=f"{i:09d}.jpg", uri=f"{i:09d}.jpg", size=1) for i in range(shards * rows))
    seen = Preprocessing(
        processor="Fake", backend="pil", channel_order="rgb", exif=False, view=View(kind="squash"), steps=()
    )
    meaning = Fingerprint(
        teacher="fake", model_class="Fake", weights="0" * 64, preset="default", preprocessing=seen, taps=(),
        pooling="none", grid=None, channels=1024,
    )  # fmt: skip
    store.put_teacher(
        TeacherRecord(fingerprint=meaning, precision="float16", source="fake", licence="MIT", libraries={})
    )
    statistics = ChannelStatistics(1024)
    statistics.update(np.random.default_rng(0).normal(size=(rows, 1024)).astype(np.float32))
    row = RowReceipt(status="ok", sha256="a" * 64, width=640, height=480)
    bad = RowReceipt(status="failed", reason="truncated", detail="the image data is damaged or cut short")
    folder = root / "receipts" / "fake"
    folder.mkdir(parents=True)
    for shard in range(shards):
        verdicts = (*[row] * (rows - 1), bad if shard % 20 == 0 else row)
        receipt = Receipt(
            teacher="fake", shard=shard, fingerprint=meaning.digest(), rows=verdicts,
            files={f"fake/values/c/{shard}/0": FileReceipt(bytes=1 << 20, sha256="b" * 64)},
            statistics=statistics.to_json(), execution=Execution(device="cpu", torch="0", batch_size=8, threads=1),
        )  # fmt: skip
        (root / receipt_file("fake", shard)).write_bytes(sealed(receipt))


def make_images(root: Path, count: int) -> None:
    """Write the first images of `write_jsonl`: names of a few pictures drawn by numpy."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    drawn = []
    for number in range(16):
        drawn.append(root / f"{number}.jpg")
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((320, 240), Image.Resampling.BICUBIC).save(drawn[-1], quality=90)
    for i in range(count):
        path = root / "train" / f"{i // 1000:06d}" / f"{i:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(drawn[i % len(drawn)])


def job(corpus: Path, images: Path, out: Path, shards: int) -> dict[str, float]:
    """Run `olapipe extract` until so many shards are done, stop it by Ctrl-C; return peak memory in MiB, seconds."""
    arguments = [corpus, "--images", images, "--out", out, "--teacher", "depth", "--checkpoint", f"depth={CHECKPOINT}"]
    arguments += ["--shard-size", ROWS, "--device", "cpu"]
    started = time.monotonic()
    driver = subprocess.Popen([sys.executable, "-m", "olapipe", "extract", *map(str, arguments)])
    peaks = dict.fromkeys(("planning", "driver", "workers", "olapipe", "ray", "together"), 0.0)
    found: dict[str, float] = {}
    done = 0
    while driver.poll() is None:
        memory = memory_of(driver.pid)
        if len(memory) == 1 and not done:
            peaks["planning"] = max(peaks["planning"], memory.get("driver", 0.0))
        elif "planned_after_seconds" not in found:
            found["planned_after_seconds"] = time.monotonic() - started
        memory["olapipe"] = memory.get("driver", 0.0) + memory.get("workers", 0.0)
        memory["together"] = memory["olapipe"] + memory.get("ray", 0.0)
        peaks = {name: max(peak, memory.get(name, 0.0)) for name, peak in peaks.items()}
        receipts = out / "receipts" / "depth"
        now = sum(1 for _ in receipts.iterdir()) if receipts.exists() else 0
        if now >= shards > done:
            found["stopped_after_seconds"] = time.monotonic() - started
            driver.send_signal(signal.SIGINT)
        done = now
        time.sleep(1.0)
    if driver.returncode != 130:
        raise SystemExit(f"olapipe extract ended with status {driver.returncode}, not that of Ctrl-C")
    return {f"{name}_mib": peak for name, peak in peaks.items()} | found | {"shards": done}


def memory_of(driver: int) -> dict[str, float]:
    """Return the PSS in MiB of a process and its descendants: `driver`, `workers` that hold teachers, `ray`."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found: dict[str, float] = {}
    for process in parents:
        chain = [process]
        while chain[-1] in parents and chain[-1] != driver:
            chain.append(parents[chain[-1]])
        if chain[-1] != driver:
            continue
        try:
            name = Path(f"/proc/{process}/cmdline").read_bytes()
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kind = "driver" if process == driver else "workers" if name.startswith(b"ray::ShardWorker") else "ray"
        kibibytes = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        found[kind] = found.get(kind, 0.0) + kibibytes / 1024
    return found


def child(kind: str, *arguments: str) -> dict[str, float]:
    """Run one measurement in a process of its own; return its seconds and its peak memory in MiB."""
    output = subprocess.run(
        [sys.executable, __file__, "--child", kind, *arguments], check=True, capture_output=True, text=True
    )
    return dict(json.loads(output.stdout))


def run_child(kind: str, arguments: list[str]) -> None:
    if kind == "resume":
        seconds = resume(int(arguments[0]), Path(arguments[1]))
    else:
        corpus, images, out = Path(arguments[0]), Path(arguments[1]) if arguments[1] else None, Path(arguments[2])
        seconds = (plan if kind == "plan" else plain)(corpus, images, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds["processor"] = time.process_time()
    print(json.dumps({name: round(value, 3) for name, value in seconds.items()} | {"peak_mib": round(peak)}))


def measure(arguments: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    found: dict[str, Any] = {"jsonl": {}, "tar": {}, "dict": {}, "resume": {}}
    if arguments.add:
        found = json.loads(arguments.out.read_text(encoding="utf-8"))["results"]
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    empty = work / "images"
    empty.mkdir()
    try:
        for images in arguments.images:
            corpus = work / "c.jsonl"
            write_jsonl(corpus, images)
            found["jsonl"][str(images)] = child("plan", str(corpus), str(empty), str(work / "s"))
            print("jsonl", images, found["jsonl"][str(images)], flush=True)
            if images <= arguments.dict_up_to:
                found["dict"][str(images)] = child("plain", str(corpus), str(empty), str(work / "d"))
                print("dict", images, found["dict"][str(images)], flush=True)
            corpus.unlink()
            shutil.rmtree(work / "s")
            save(found)
        for images in arguments.tar_images:
            write_tars(work / "tars", images)
            found["tar"][str(images)] = child("plan", str(work / "tars"), "", str(work / "s"))
            print("tar", images, found["tar"][str(images)], flush=True)
            shutil.rmtree(work / "tars")
            shutil.rmtree(work / "s")
            save(found)
        for shards in arguments.shards:
            make_store(work / "r", shards)
            found["resume"][str(shards)] = child("resume", str(shards), str(work / "r"))
            print("resume", shards, found["resume"][str(shards)], flush=True)
            shutil.rmtree(work / "r")
            save(found)
        if arguments.job_images:
            make_images(empty, (arguments.job_shards + 8) * ROWS)
        for images in arguments.job_images:
            corpus = work / "c.jsonl"
            write_jsonl(corpus, images)
            figures = job(corpus, empty, work / "s", arguments.job_shards)
            found.setdefault("job", {})[str(images)] = {name: round(value, 1) for name, value in figures.items()}
            print("job", images, found["job"][str(images)], flush=True)
            corpus.unlink()
            shutil.rmtree(work / "s")
            save(found)
    finally:
        shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--tar-images", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--shards", type=int, nargs="*", default=[10**3, 10**4, 10**5])
    parser.add_argument("--job-images", type=int, nargs="*", default=[10**5, 10**7])
    parser.add_argument("--job-shards", type=int, default=24, help="after so many the job is stopped")
    parser.add_argument("--dict-up-to", type=int, default=10**6, help="largest corpus for the dict in memory")
    parser.add_argument("--work", type=Path, help="folder for the generated corpora, 12 GB at 10^7 images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="keep the other figures of the result file")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child[0], arguments.child[1:])
        return

    def save(found: dict[str, Any]) -> None:
        record = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "load": [round(each, 1) for each in os.getloadavg()],
            "versions": {name: version(name) for name in ("pyarrow", "numpy")} | {"python": platform.python_version()},
            "what": (__doc__ or "").strip(),
            "results": found,
        }
        arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    measure(arguments, save)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
