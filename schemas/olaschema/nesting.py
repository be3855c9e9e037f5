"""Nothing new is made inside a store: its files would be strays there, or another teacher's."""

from __future__ import annotations

import json
from pathlib import Path

from olaschema.errors import StoreError
from olaschema.place import open_place


def require_outside_stores(where: str | Path) -> None:
    """Raise StoreError if a folder above `where`, or a prefix above it in a bucket, is a feature store."""
    for above in _above(str(where)):
        data = open_place(above).find("zarr.json")
        if data is not None and _is_store(data):
            raise StoreError(
                f"{where} lies inside the feature store {above}, where it would count as damage",
                "Choose a place outside of it.",
            )


def _above(where: str) -> list[str]:
    if "://" not in where:
        return [str(folder) for folder in Path(where).resolve().parents]
    parts = where.rstrip("/").split("/")
    return ["/".join(parts[:count]) for count in range(4, len(parts))]  # the bucket itself is no prefix


def _is_store(data: bytes) -> bool:
    try:
        return "rows_per_shard" in json.loads(data)["attributes"]["ola"]
    except (ValueError, KeyError, TypeError):
        return False
