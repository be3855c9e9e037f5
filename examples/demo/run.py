"""The whole path in minutes on a CPU: extract, look, compose, train, and a control.

    python examples/demo/run.py OUT

Every step is a command that you could type; it is printed before it runs. The pictures are photographs and scenes of
`examples/toyworld`; the teachers are the small ones trained on such scenes, so they see depth and shapes in scenes and
next to nothing in photographs. Language model and vision tower are tiny and random: what is shown is that the path
works and that the student learns *these images'* features, not that anything useful was learnt.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoints
import photographs

TEACHERS = ("depth", "seg", "gen")
# Six decoder blocks: the published layers of a 32-block model (depth 18, 20; seg 10, 18; gen 12, 20), scaled
LAYERS = {"depth": [3, 4], "seg": [2, 3], "gen": [2, 4]}
STEPS = 40
BATCH = 8
TOYWORLD = Path(__file__).parents[1] / "toyworld"
SCENES, HELD_OUT_SCENES = 56, 8
"""Scenes to train on and held out: as many as there are pictures of photographs."""
SCENE, PHOTOGRAPH = "scenes/test-000.png", "coffee.png"
"""Pictures to look at; both are held out."""


def main() -> int:
    """Run the demo into the folder named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Photographs, features, a trained student, and a control.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for everything the demo makes; emptied first")
    out: Path = parser.parse_args().out
    started = time.monotonic()
    if out.exists():
        if any(out.iterdir()) and not (out / "corpus").is_dir():
            print(f"error: {out} exists and is not a demo's folder\nName a new folder.", file=sys.stderr)
            return 2
        shutil.rmtree(out)
    out.mkdir(parents=True)

    heading("Photographs (from the scikit-image wheel) and crops of them, a tiny random student; scenes")
    for status in (photographs.main([str(out / "corpus")]), checkpoints.main([str(out / "checkpoints")])):
        if status:
            return status
    counts = ["--train", str(SCENES), "--heldout", str(HELD_OUT_SCENES)]
    command("python", str(TOYWORLD / "pictures.py"), f"{out}/corpus", *counts)
    for side in ("train", "heldout"):
        join(out / "corpus", side)
    # a copy: the training below is to run while they are out of reach
    shutil.copytree(TOYWORLD / "teachers", out / "checkpoints", dirs_exist_ok=True)

    heading("Features of three teachers, into one store")
    extract = ["olapipe", "extract", f"{out}/corpus/images", "--out", f"{out}/features.zarr", "--shard-size", "16"]
    for teacher in TEACHERS:
        extract += ["--teacher", teacher, "--checkpoint", f"{teacher}={out}/checkpoints/{teacher}"]
    command(*extract)

    heading("The same command again: nothing is left to do")
    command(*extract)

    heading("What is in the store")
    command("olapipe", "inspect", f"{out}/features.zarr")
    images = ["--images", f"{out}/corpus/images"]
    for key, name in ((SCENE, "scene"), (PHOTOGRAPH, "photograph")):
        decoders = [f"--checkpoint={teacher}={out}/checkpoints/{teacher}" for teacher in ("depth", "seg")]
        command("olapipe", "preview", f"{out}/features.zarr", key, *images, *decoders, "--out", f"{out}/{name}.png")

    heading("A student: language model and vision tower joined, with task tokens")
    command(
        "olatrain",
        "compose",
        "--llm",
        f"{out}/checkpoints/llm",
        "--vision",
        f"{out}/checkpoints/vision",
        "--out",
        f"{out}/student",
    )

    heading("Training on two ranks, without any teacher: they are moved away")
    teachers_away = out / "checkpoints-not-needed-any-more"
    (out / "checkpoints").rename(teachers_away)
    config = out / "train.yaml"
    config.write_text(json.dumps(train_config(out), indent=1) + "\n", encoding="utf-8")
    command("olatrain", "run", "--config", str(config))

    heading("The control: the same run on features shuffled across images")
    command("olatrain", "run", "--config", str(config), "--out", f"{out}/shuffled", "--set", "target_control=shuffle")
    teachers_away.rename(out / "checkpoints")

    heading("What the student says of a scene it was not trained on, beside what the teacher says")
    layer = LAYERS["depth"][-1]
    command(
        "olapipe", "preview", f"{out}/features.zarr", SCENE, *images, f"--checkpoint=depth={out}/checkpoints/depth",
        "--predictions", f"{out}/run/predictions/step-{STEPS:08d}/layer-{layer:02d}", "--teacher", "depth",
        "--out", f"{out}/predicted.png",
    )  # fmt: skip

    heading("Held-out pictures: embedding loss of each teacher beside the floor of the mean map")
    curves = {name: heldout(out / name / "metrics.jsonl") for name in ("run", "shuffled")}
    plot(curves, out / "curves.png")
    lower = table(curves)

    heading(f"Done in {time.monotonic() - started:.0f} s")
    print(
        f"Look at   {out}/curves.png       the curves above, as a picture\n"
        f"          {out}/scene.png        a scene: depth and segments, by the teacher and decoded from the store\n"
        f"          {out}/photograph.png   the same of a photograph, of which these teachers know nothing\n"
        f"          {out}/predicted.png    the depth that the student's hidden states hold, beside the target\n"
        f"          tensorboard --logdir {out}/run\n"
        f"Try next  . {Path(sys.prefix).name}/bin/activate\n"
        f"          olapipe inspect {out}/features.zarr --json\n"
        f"          olatrain run --config {config} --set epochs=null --set steps={2 * STEPS} --out {out}/longer\n"
        f"          your own images: olapipe extract FOLDER --out STORE --teacher depth (see README.md)"
    )
    if not lower:
        print("error: on held-out pictures the real features did not end below the shuffled ones", file=sys.stderr)
        return 1
    return 0


def train_config(out: Path) -> dict[str, Any]:
    """Return the settings of the training run."""
    return {
        "student": f"{out}/student",
        "store": f"{out}/features.zarr",
        "conversations": f"{out}/corpus/train.json",
        "images": f"{out}/corpus/images",
        "out": f"{out}/run",
        "teachers": {name: {"layers": layers} for name, layers in LAYERS.items()},
        "evaluation": {"conversations": f"{out}/corpus/heldout.json", "every": STEPS // 4},
        "steps": STEPS,
        "batch": BATCH,
        "lr": 1e-3,
        "nproc": 2,
        "workers": 0,
        "checkpoint_every": STEPS // 2,
        "predictions": {"every": STEPS, "images": 20},
        "log_every": 10,
    }


def join(corpus: Path, side: str) -> None:
    """Add the scenes' conversations to those of the photographs."""
    samples = [json.loads((corpus / f"{part}{side}.json").read_text(encoding="utf-8")) for part in ("", "scenes-")]
    text = json.dumps(samples[0] + samples[1], indent=1, ensure_ascii=False) + "\n"
    (corpus / f"{side}.json").write_text(text, encoding="utf-8", newline="\n")


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n=== {text}", flush=True)


def command(*arguments: str) -> None:
    """Print a command as it would be typed and run it; ends the demo if it fails."""
    print("$ " + shlex.join(arguments), flush=True)
    program = Path(sys.executable).with_name(arguments[0])
    finished = subprocess.run([str(program), *arguments[1:]], env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    if finished.returncode:
        sys.exit(f"error: the command above ended with status {finished.returncode}")


Curve = dict[str, dict[str, list[float]]]
"""Teacher → {step, loss, floor}: the embedding loss on held-out pictures, and what the mean map would get."""


def heldout(metrics: Path) -> Curve:
    """Read the evaluations of a run: smooth-L1 averaged over the supervised layers, beside the mean map's."""
    curve: Curve = {name: {"step": [], "loss": [], "floor": []} for name in TEACHERS}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] != "evaluation":
            continue
        for name in TEACHERS:
            found = record["teachers"][name]
            layers = [layer["smooth_l1"] for layer in found["layers"].values()]
            curve[name]["step"].append(record["step"])
            curve[name]["loss"].append(sum(layers) / len(layers))
            curve[name]["floor"].append(found["mean_map"]["smooth_l1"])
    return curve


def table(curves: dict[str, Curve]) -> bool:
    """Print both curves beside the floor; return whether the real features end lower, all teachers together."""
    print("smooth-L1 on held-out pictures; floor: predicting the mean training map for every image")
    for name in TEACHERS:
        real, shuffled = curves["run"][name], curves["shuffled"][name]
        print(f"{name:6} step     " + "  ".join(f"{step:6d}" for step in real["step"]))
        print("       real     " + "  ".join(f"{loss:6.4f}" for loss in real["loss"]))
        print("       shuffled " + "  ".join(f"{loss:6.4f}" for loss in shuffled["loss"]))
        print(f"       floor    {real['floor'][-1]:6.4f}")
    ends = {name: sum(curve["loss"][-1] for curve in run.values()) for name, run in curves.items()}
    floor = sum(curve["floor"][-1] for curve in curves["run"].values())
    print(f"sum    real     {ends['run']:6.4f}  shuffled {ends['shuffled']:6.4f}  floor {floor:6.4f}")
    return ends["run"] < ends["shuffled"]


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Draw the curves of the table."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TEACHERS), figsize=(12, 4), layout="constrained")
    for axis, name in zip(axes, TEACHERS, strict=True):
        for run, label in (("run", "real features"), ("shuffled", "features shuffled across images")):
            axis.plot(curves[run][name]["step"], curves[run][name]["loss"], marker=".", label=label)
        axis.axhline(curves["run"][name]["floor"][-1], color="grey", linestyle="--", label="mean map")
        axis.set(title=name, xlabel="step", ylabel="smooth-L1, held-out pictures")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
