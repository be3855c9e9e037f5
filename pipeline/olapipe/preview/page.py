"""`olapipe preview`: stored features of one image, decoded, beside the image and what the full teacher says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olapipe.preview.base import Decoder, Unavailable
from olapipe.preview.decoders import GRID_BEFORE, load_decoder, load_teacher, on_own_grid
from olapipe.preview.panels import Cell, PcaColours, arrange, strip
from olapipe.preview.rows import find_sample, read_feature, read_picture
from olapipe.teachers.base import Teacher
from olaschema.errors import OlaError, StoreError
from olaschema.images import DEFAULT_MAX_PIXELS, DecodedImage
from olaschema.manifest import SampleRow, TeacherRecord
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

FULL = "the full teacher"
STORED = "decoded from the store"
PREDICTED = "decoded from the prediction"
CONTROL = "the store's mean in its place"


@dataclass
class Page:
    """A picture and the lines of text that belong to it."""

    heading: str
    rows: list[list[Cell | None]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the picture; raises OlaError where it cannot be written or the name is of no picture."""
        try:
            arrange(self.heading, self.rows).save(path)
        except (OSError, ValueError) as error:  # Pillow: an unknown extension is a ValueError
            raise OlaError(f"{path} cannot be written: {error}", "Give a .png in a folder that exists.") from error


@dataclass(frozen=True)
class PreviewSettings:
    """What to show of a key. `checkpoints` names a local folder (or file) per teacher; `teachers` None means all.

    Without `images` there is no image, no full teacher and no panoptic map; without a teacher's checkpoint there are
    only PCA colours of its features.
    """

    images: Path | None = None
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    teachers: Sequence[str] | None = None
    device: str = "cpu"
    max_pixels: int = DEFAULT_MAX_PIXELS


def preview(store: FeatureStore, key: str, settings: PreviewSettings, predictions: FeatureStore | None = None) -> Page:
    """Show what a store holds of one image; `predictions` is a second store with features of the same meaning.

    Raises StoreError where key or teacher are unknown or no teacher has a feature of it, FingerprintError where a
    checkpoint or a prediction is of another feature, ImageError where the image is not the one extracted.
    """
    names = list(settings.teachers or store.teachers())
    readers = {name: FeatureReader(store, name) for name in names}
    for name in settings.checkpoints:
        if name not in readers:
            store.teacher(name)
            raise StoreError(f"--checkpoint {name}: {name} is not among the teachers shown", f"Add --teacher {name}.")
    sample = find_sample(store, key)
    page = Page(f"{key}  ·  {store.place.name}" + (f"  ·  predictions {predictions.place.name}" if predictions else ""))
    features: dict[str, np.ndarray] = {}
    for name, reader in readers.items():
        try:
            features[name] = read_feature(store, reader, sample)
        except StoreError as error:
            if len(readers) == 1:
                raise
            page.lines += str(error).splitlines()
    if not features:
        raise StoreError("\n".join(page.lines) or f"{store.url} has no teacher", "There is nothing to show.")
    image = _image(settings, sample, [readers[name] for name in features])
    if image is None:
        page.lines.append("No --images folder: the image and what the full teacher says of it are not shown.")
    for name, feature in features.items():
        predicted = _predicted(predictions, key, readers[name].record, page)
        status = readers[name].status(sample.row)
        section = _Section(
            page,
            readers[name].record,
            image,
            settings,
            mean=store.statistics(name).mean.astype(np.float32),
            digest=str(status.sha256 if status else None),
        )
        section.show(feature, predicted)
    return page


def _image(settings: PreviewSettings, sample: SampleRow, readers: list[FeatureReader]) -> DecodedImage | None:
    if settings.images is None:
        return None
    receipts = [status for reader in readers if (status := reader.status(sample.row)) is not None]
    return read_picture(settings.images, sample, receipts, settings.max_pixels)


def _predicted(store: FeatureStore | None, key: str, target: TeacherRecord, page: Page) -> np.ndarray | None:
    """Return the same image's feature in the store of predictions, None where it has none and the page says so."""
    name = target.fingerprint.teacher
    if store is None:
        return None
    if name not in store.teachers():
        page.lines.append(f"{name}: {store.url} holds no predictions of it.")
        return None
    reader = FeatureReader(store, name)
    target.fingerprint.require_equal(
        reader.fingerprint, mine="in the store", theirs="in the predictions",
        remedy="Give predictions that were trained on this store's features.",
    )  # fmt: skip
    return read_feature(store, reader, find_sample(store, key))


class _Section:
    """The rows of one teacher on the page."""

    def __init__(
        self,
        page: Page,
        record: TeacherRecord,
        image: DecodedImage | None,
        settings: PreviewSettings,
        *,
        mean: np.ndarray,
        digest: str,
    ) -> None:
        self._page = page
        self._record = record
        self._image = image
        self._settings = settings
        self._mean = mean
        self._digest = digest
        self._name = record.fingerprint.teacher
        self._shown = image.oriented(exif=record.fingerprint.preprocessing.exif) if image is not None else None

    def show(self, feature: np.ndarray, predicted: np.ndarray | None) -> None:
        """Add the decoded row where there is a decoder, and the row of the features themselves."""
        teacher, decoder = self._load()
        pixels = teacher.preprocessor(self._image) if teacher is not None and self._image is not None else None
        live = self._live(teacher, pixels) if teacher is not None and pixels is not None else None
        if live is not None:
            error = np.linalg.norm(feature - live) / max(float(np.linalg.norm(live)), 1e-12)
            self._say(f"stored against computed now: relative L2 {error:.2e} ({self._record.precision})")
        if predicted is not None:
            error = np.linalg.norm(predicted - feature) / max(float(np.linalg.norm(feature)), 1e-12)
            floor = np.linalg.norm(self._mean - feature) / max(float(np.linalg.norm(feature)), 1e-12)
            self._say(
                f"prediction against stored: relative L2 {error:.3f}; the store's mean feature alone: {floor:.3f}"
            )
        if decoder is not None:
            self._decoded_row(decoder, feature, predicted, pixels)
        self._feature_row(feature, predicted, live, first=decoder is None)

    def _say(self, text: str) -> None:
        self._page.lines.append(f"{self._name}: {text}")

    def _load(self) -> tuple[Teacher | None, Decoder[Any] | None]:
        checkpoint = self._settings.checkpoints.get(self._name)
        if checkpoint is None:
            self._say(f"not decoded; add --checkpoint {self._name}=FOLDER ({self._record.source})")
            return None, None
        teacher = load_teacher(self._record.fingerprint, checkpoint, self._settings.device)
        try:
            decoder = load_decoder(self._record.fingerprint, checkpoint, self._settings.device)
        except Unavailable as error:
            self._page.lines += str(error).splitlines()
            return teacher, None
        if decoder.needs_pixels and self._image is None:
            self._say("not decoded: its decoder also reads the image; add --images FOLDER")
            return teacher, None
        return teacher, decoder

    def _live(self, teacher: Teacher, pixels: np.ndarray) -> np.ndarray:
        live: np.ndarray = teacher.encode_images(torch.from_numpy(pixels)[None], [self._digest])[0].cpu().numpy()
        return live

    def _decoded_row(
        self, decoder: Decoder[Any], feature: np.ndarray, predicted: np.ndarray | None, pixels: np.ndarray | None
    ) -> None:
        fingerprint = self._record.fingerprint
        full = decoder.full(pixels) if pixels is not None else None
        if GRID_BEFORE in fingerprint.options:
            self._say(f"decoded after resizing back to {fingerprint.options[GRID_BEFORE]}, bilinearly")
        feature = on_own_grid(feature, fingerprint)
        predicted = on_own_grid(predicted, fingerprint) if predicted is not None else None
        shown: list[tuple[str, Any]] = [
            (FULL, full),
            (STORED, decoder.decode(feature, pixels)),
            (PREDICTED, decoder.decode(predicted, pixels) if predicted is not None else None),
        ]
        control = None
        if decoder.needs_pixels or (predicted is not None and full is not None):
            # what the decoder makes of the image alone, or of no image, when the feature says nothing about it
            control = decoder.decode(np.broadcast_to(self._mean, feature.shape).copy(), pixels)
        if decoder.needs_pixels:
            shown.append((CONTROL, control))
        row: list[Cell | None] = [self._picture()]
        for title, output in shown:
            if output is None:
                row.append(None)
                continue
            drawing = decoder.draw(output)
            row.append(self._cell(title, drawing.rgb, drawing.caption))
            if full is not None and title != FULL:
                self._say(f"{title}: {decoder.agreement(full, output)}")
        if control is not None and not decoder.needs_pixels:
            self._say(f"{CONTROL}: {decoder.agreement(full, control)}")
        self._page.rows.append(row)

    def _feature_row(
        self, feature: np.ndarray, predicted: np.ndarray | None, live: np.ndarray | None, *, first: bool
    ) -> None:
        row: list[Cell | None] = [self._picture(self._described()) if first else self._facts()]
        paint, caption = _paint(feature)
        for title, values in (("computed now", live), ("in the store", feature), ("predicted", predicted)):
            row.append(self._cell(f"features {title}", paint(values), caption) if values is not None else None)
        self._page.rows.append(row)

    def _cell(self, title: str, rgb: np.ndarray, caption: str) -> Cell:
        return Cell(f"{self._name}: {title}", rgb, caption, self._aspect)

    @property
    def _aspect(self) -> float | None:
        """Maps of a squashed image are shown in the image's own shape."""
        fingerprint = self._record.fingerprint
        if self._shown is None or fingerprint.grid is None or fingerprint.preprocessing.view.kind != "squash":
            return None
        return self._shown.width / self._shown.height

    def _picture(self, caption: str = "") -> Cell:
        if self._shown is None:
            return self._facts()
        return Cell("image", np.asarray(self._shown), f"{self._shown.width} x {self._shown.height}\n{caption}".strip())

    def _facts(self) -> Cell:
        return Cell(self._name, None, self._described())

    def _described(self) -> str:
        fingerprint = self._record.fingerprint
        shape = " x ".join(map(str, fingerprint.shape))
        view = fingerprint.preprocessing.view.describe()
        return (
            f"{self._record.source}\n{fingerprint.model_class}, preset {fingerprint.preset}\n"
            f"{shape} in {self._record.precision}\nsaw {view}"
        )


def _paint(feature: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Return how to colour features of this one's shape, with colours and scale fixed by it, and the caption."""
    if feature.ndim == 3:
        return PcaColours(feature), "first 3 principal components of the stored tokens"
    reach = float(np.abs(feature).max())
    return (lambda values: strip(values, reach)), f"{len(feature)} channels, -{reach:.3g} to {reach:.3g}"
