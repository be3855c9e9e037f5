"""Photographs for the demo: those the scikit-image wheel carries, crops of them, and LLaVA-style conversations.

    python examples/demo/photographs.py OUT

writes `OUT/images/NAME.png`, `OUT/conversations.json` and its two parts, `OUT/train.json` and `OUT/heldout.json`,
which share no photograph. The captions are in `photographs.json` beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from olaschema.errors import CorpusError, OlaError

CATALOGUE = Path(__file__).with_name("photographs.json")
PROMPT = "Describe the picture."
SEED = 20250101
MAX_SIDE = 640
CROPS_OF_COLOUR = 5
CROPS_OF_GREY = 1
# width : height of the crops
ASPECTS = (1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16, 2.0, 1 / 2)
AREA_SHARES = (0.25, 0.6)


@dataclass(frozen=True)
class Photograph:
    """One photograph of the catalogue.

    Photographs of one `scene` (the two views of a stereo pair) are always on the same side of the split.
    """

    name: str
    file: str
    colour: bool
    heldout: bool
    scene: str
    caption: str
    subject: str
    left: str
    centre: str
    right: str


@dataclass(frozen=True)
class Picture:
    """A photograph as a whole or a crop of it: its name without extension, its pixels and its caption."""

    name: str
    photograph: Photograph
    image: Image.Image
    caption: str


def read_catalogue() -> list[Photograph]:
    """Return the photographs of the catalogue, in its order."""
    return [Photograph(**entry) for entry in _catalogue()["photographs"]]


def catalogue_texts() -> list[str]:
    """Return every sentence and phrase of the demo once, in a fixed order: what the tokenizer is trained on."""
    texts = [PROMPT]
    for photograph in read_catalogue():
        texts += [photograph.caption, photograph.subject, photograph.left, photograph.centre, photograph.right]
    for entry in _catalogue()["questions_without_image"]:
        texts += [entry["question"], entry["answer"]]
    return texts


def _catalogue() -> dict[str, Any]:
    catalogue: dict[str, Any] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return catalogue


def open_photograph(photograph: Photograph) -> Image.Image:
    """Return the photograph as scikit-image's wheel carries it, `RGB` or `L`, its longer side at most 640 pixels.

    Raises CorpusError where scikit-image is not installed or its wheel does not list the file: nothing is ever
    downloaded.
    """
    try:
        listed = metadata.files("scikit-image") or []
    except metadata.PackageNotFoundError as error:
        raise CorpusError(
            "scikit-image is not installed", "Install the extra `dev`: pip install -e '.[dev]'"
        ) from error
    paths = [Path(str(entry.locate())) for entry in listed if entry.as_posix() == f"skimage/data/{photograph.file}"]
    if not paths or not paths[0].is_file():
        raise CorpusError(
            f"the installed scikit-image carries no skimage/data/{photograph.file}",
            "Install scikit-image from its wheel, version 0.25 or newer.",
        )
    with Image.open(paths[0]) as opened:
        image = opened.convert("RGB" if photograph.colour else "L")
    longer = max(image.size)
    if longer > MAX_SIDE:
        width, height = (max(1, round(side * MAX_SIDE / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    # A copy by pixels leaves colour profiles and other metadata behind.
    return Image.fromarray(np.asarray(image))


def pictures_of(photograph: Photograph) -> list[Picture]:
    """Return the whole photograph and its crops: five of a colour one, one of a grey one.

    The boxes depend on the photograph's name alone, so adding one to the catalogue leaves the others unchanged.
    """
    whole = open_photograph(photograph)
    rng = np.random.default_rng([SEED, zlib.crc32(photograph.name.encode())])
    count = CROPS_OF_COLOUR if photograph.colour else CROPS_OF_GREY
    aspects = rng.permutation(np.array(ASPECTS))[:count]
    pictures = [Picture(photograph.name, photograph, whole, photograph.caption)]
    for number, aspect in enumerate(aspects, start=1):
        box = _crop_box(whole.size, float(aspect), rng)
        caption = _crop_caption(photograph, whole.size, box)
        pictures.append(Picture(f"{photograph.name}-crop{number}", photograph, whole.crop(box), caption))
    return pictures


def _crop_box(size: tuple[int, int], aspect: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    width, height = size
    area = rng.uniform(*AREA_SHARES) * width * height
    # An elongated crop of a large area may not fit: then it is shortened, not moved outside.
    crop_width = min(width, round((area * aspect) ** 0.5))
    crop_height = min(height, round((area / aspect) ** 0.5))
    left = int(rng.integers(0, width - crop_width + 1))
    top = int(rng.integers(0, height - crop_height + 1))
    return left, top, left + crop_width, top + crop_height


def _crop_caption(photograph: Photograph, size: tuple[int, int], box: tuple[int, int, int, int]) -> str:
    x = (box[0] + box[2]) / 2 / size[0]
    y = (box[1] + box[3]) / 2 / size[1]
    column = "left" if x < 0.42 else "right" if x > 0.58 else ""
    row = "upper" if y < 0.42 else "lower" if y > 0.58 else ""
    part = {("", ""): "middle", ("upper", ""): "upper part", ("lower", ""): "lower part"}.get(
        (row, column), f"{row} {column}".strip() + " part"
    )
    seen = {"left": photograph.left, "": photograph.centre, "right": photograph.right}[column]
    return f"The {part} of {photograph.subject}: {seen}."


def conversation(identifier: str, question: str, answer: str, image: str | None = None) -> dict[str, Any]:
    """Return one LLaVA-style sample; with `image`, its question starts with the `<image>` placeholder."""
    human = question if image is None else f"<image>\n{question}"
    sample: dict[str, Any] = {"id": identifier}
    if image is not None:
        sample["image"] = image
    sample["conversations"] = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return sample


def write_corpus(out: Path) -> dict[str, int]:
    """Write pictures and conversations under `out` and return how many of each there are.

    `image` entries are relative to `out/images`. The same call writes the same bytes again. Raises CorpusError
    where a photograph is missing, OSError where `out` can't be written.
    """
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    train: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    photographs = read_catalogue()
    for photograph in photographs:
        side = heldout if photograph.heldout else train
        for picture in pictures_of(photograph):
            picture.image.save(images / f"{picture.name}.png", format="PNG")
            side.append(conversation(picture.name, PROMPT, picture.caption, f"{picture.name}.png"))
    pictures = len(train) + len(heldout)
    for entry in _catalogue()["questions_without_image"]:
        side = heldout if entry["heldout"] else train
        side.append(conversation(entry["id"], entry["question"], entry["answer"]))
    for name, samples in (("conversations", train + heldout), ("train", train), ("heldout", heldout)):
        text = json.dumps(samples, indent=1, ensure_ascii=False)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    return {"photographs": len(photographs), "pictures": pictures, "train": len(train), "heldout": len(heldout)}


def main(arguments: list[str] | None = None) -> int:
    """Write the corpus into the folder named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the demo's photographs, crops and conversations.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to, made if missing")
    out: Path = parser.parse_args(arguments).out
    try:
        counts = write_corpus(out)
    except OlaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {out} can't be written: {error}\nName a folder you may write to.", file=sys.stderr)
        return 1
    print(
        f"{counts['photographs']} photographs, {counts['pictures']} pictures with their crops in {out / 'images'}; "
        f"{counts['train']} conversations to train on, {counts['heldout']} held out"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
