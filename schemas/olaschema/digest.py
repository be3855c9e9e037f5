"""Documents that carry their own digest, so that a changed byte in a JSON file shows when it is read.

The field `digest` is the SHA-256 of the whole file with the 64 characters of that digest written as zeros. It covers
spaces and line ends too, and needs no agreement on how JSON is formatted.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from pydantic import BaseModel

from olaschema.manifest import canonical_json

FIELD = "digest"
_ZEROS = "0" * 64
_HEX = re.compile(r"[0-9a-f]{64}")


def stamp(document: dict[str, Any], holder: dict[str, Any]) -> bytes:
    """Return `document` as canonical JSON with its digest in `holder`, which is the document or an object inside it."""
    holder[FIELD] = _ZEROS
    blank = canonical_json(document)
    if blank.count(_field(_ZEROS)) != 1:
        raise ValueError(f"a document may hold no other field {FIELD!r} of 64 zeros")
    digest = hashlib.sha256(blank).hexdigest()
    holder[FIELD] = digest
    return blank.replace(_field(_ZEROS), _field(digest))


def sealed(model: BaseModel) -> bytes:
    """Return the document of `model`: canonical JSON with its digest."""
    document = model.model_dump(mode="json")
    return stamp(document, document)


def intact(data: bytes, digest: object) -> bool:
    """Whether the file `data` is the one that the `digest` found in it was taken of."""
    if not isinstance(digest, str) or not _HEX.fullmatch(digest) or data.count(_field(digest)) != 1:
        return False
    return hashlib.sha256(data.replace(_field(digest), _field(_ZEROS))).hexdigest() == digest


def _field(digest: str) -> bytes:
    return f'"{FIELD}": "{digest}"'.encode()
