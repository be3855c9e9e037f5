"""Which precision each teacher of a run is stored in, and its basis, settled before the first shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olapipe.config import ExtractConfig
from olapipe.corpus import Listing
from olapipe.load import cpu_threads, load_one
from olapipe.progress import Reporter
from olaschema.basis import Basis
from olaschema.manifest import Precision, TeacherRecord
from olaschema.place import Place
from olaschema.precision import is_centred
from olaschema.store import FeatureStore
from olaschema.zarrbytes import zstd_level

if TYPE_CHECKING:
    from olapipe.sample import Sampled

LOG = "precision.jsonl"
_SCORED = 32


@dataclass(frozen=True)
class Tier:
    """The precision of one teacher; for klt the basis and the number of images that it was fitted on."""

    precision: Precision
    basis: Basis | None = None
    images: int = 0

    def settle(self, record: TeacherRecord) -> TeacherRecord:
        """Return a teacher's record with this precision."""
        basis = self.basis.record(self.images) if self.basis is not None else None
        changes = {
            "precision": self.precision,
            "basis": basis,
            "centred": is_centred(record.fingerprint.shape, self.precision),
            "zstd_level": zstd_level(self.precision),
        }
        return record.model_copy(update=changes)


def present(config: ExtractConfig, store: FeatureStore | None) -> dict[str, Tier]:
    """Return the tiers of the teachers that the store holds already, where they are as asked for; nothing is fitted."""
    found = {}
    for name in config.teachers:
        if store is None or name not in store.teachers():
            continue
        record = store.teacher(name)
        if config.precision in ("auto", record.precision):
            images = record.basis.images if record.basis is not None else 0
            found[name] = Tier(record.precision, store.basis(record), images)
    return found


def choose(
    config: ExtractConfig, listing: Listing, store: FeatureStore | None, place: Place, reporter: Reporter
) -> Mapping[str, Tier]:
    """Settle the precision of every teacher; the same corpus and settings choose the same.

    Teachers that are in the store keep what they have. For `auto` and `klt` the others run here on a sample of the
    corpus, in batches and threads of the settings; the figures of `auto` go to `_log/precision.jsonl`. Raises
    CorpusError for too few images.
    """
    tiers = present(config, store)
    for name in config.teachers:
        if name in tiers:
            continue
        held = store is not None and name in store.teachers()  # in another precision: the store refuses, and says why
        if config.precision == "auto" or (config.precision == "klt" and not held):
            tiers[name] = _fitted(config, listing, name, place, reporter)
        else:
            tiers[name] = Tier(config.precision)
    return tiers


def _fitted(config: ExtractConfig, listing: Listing, name: str, place: Place, reporter: Reporter) -> Tier:
    from olapipe.sample import from_corpus

    reporter.say(f"{name}: running on at most {config.fit_images} images to settle the precision …")
    with cpu_threads(config.threads):
        sampled = from_corpus(listing, load_one(config, name), config.fit_images, config.max_pixels, config.batch_size)
        return _settled(config, name, sampled, place, reporter)


def _settled(config: ExtractConfig, name: str, sampled: Sampled, place: Place, reporter: Reporter) -> Tier:
    from olapipe.fidelity import all_tiers, smallest
    from olapipe.klt import fit_basis
    from olapipe.sample import split

    if config.precision == "klt":
        basis = fit_basis(list(sampled.features), config.max_gradient_error)
        return Tier("klt", basis, len(sampled.keys))
    fitting, scored = split(sampled, _SCORED)
    figures, basis = all_tiers(fitting, scored, config.max_gradient_error)
    best = smallest(figures, config.max_gradient_error)
    line = {"teacher": name, "chosen": best.name, "max_gradient_error": config.max_gradient_error}
    line |= {"fitted_on": len(fitting), "scored_on": len(scored), "figures": [tier.to_json() for tier in figures]}
    place.append_log(LOG, json.dumps(line))
    reporter.say(
        f"{name}: {best.name}, {best.stored_bytes or 0:.0f} bytes per image, gradient error {best.gradient_error:.2g}"
    )
    return Tier("klt", basis, len(fitting)) if best.name == "klt" else Tier(best.name)  # type: ignore[arg-type]
