"""Which rows show one image, and whose features each gets under the `shuffle` control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from olaschema.errors import ConfigError
from olatrain.config import TrainConfig
from olatrain.join import Listing
from olatrain.order import cyclic_partners
from olatrain.parallel import Ranks
from olatrain.source import Data, Opened


def same_images(opened: Opened, listing: Listing, teachers: Sequence[str]) -> dict[int, int]:
    """Return by row of a listing's images the first row whose image has the same bytes, its own where none is known.

    The digests are those of receipts: an image that no teacher of these was tried on is taken for one of its own.
    """
    places = dict(zip(listing.image_rows.tolist(), listing.image_places.tolist(), strict=True))
    firsts: dict[str, int] = {}
    found = {}
    for row in sorted(row for row in places if row >= 0):
        statuses = (opened.status(name, places[row]) for name in teachers)
        digest = next((status.sha256 for status in statuses if status is not None and status.sha256), None)
        found[row] = row if digest is None else firsts.setdefault(digest, row)
    return found


def known_images(config: TrainConfig, data: Data, listing: Listing, ranks: Ranks) -> dict[int, int]:
    """By row the first one of the same bytes, where it matters; read once and handed to the other ranks."""
    if config.probe is None and config.target_control != "shuffle":
        return {}
    rows = np.unique(listing.image_rows[listing.image_rows >= 0])
    firsts = torch.zeros(len(rows), dtype=torch.int64)
    if ranks.first:
        found = same_images(data.open(), listing, config.reads)
        firsts = torch.tensor([found[row] for row in rows.tolist()], dtype=torch.int64)
    return dict(zip(rows.tolist(), ranks.sum(firsts.to(ranks.device)).tolist(), strict=True))


def partners(config: TrainConfig, listing: Listing, same: Mapping[int, int]) -> dict[int, int] | None:
    """For the `shuffle` control: by row, the place of another image, `same` being one image in several rows."""
    if config.target_control != "shuffle":
        return None
    planned = listing.image_rows >= 0
    places = dict(zip(listing.image_rows[planned].tolist(), listing.image_places[planned].tolist(), strict=True))
    place_of = {same[row]: place for row, place in places.items()}
    found = cyclic_partners(np.asarray(list(place_of), dtype=np.int64), seed=config.seed)
    if len(found) == 1:
        raise ConfigError(
            "target_control = shuffle gives every image another's features, and there is one image in the store",
            "Train on more images.",
        )
    return {row: place_of[found[same[row]]] for row in places}
