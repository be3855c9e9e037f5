"""Keys: the one name by which images, conversations and features are joined."""

from __future__ import annotations

import hashlib

from olaschema.errors import ImageError


def normalise_key(text: str) -> str:
    """Return the POSIX path relative to the corpus root that `text` means: `./a//b.jpg` is `a/b.jpg`.

    Raises ImageError `outside-root` for absolute paths, URLs and paths that climb out of the root, and
    `bad-name` for text that is no UTF-8 file name.
    """
    if "\0" in text or not text.strip():
        raise ImageError("bad-name", f"{text!r} is not a file name", "Give a path relative to the image folder.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise ImageError("bad-name", f"{shown}: the file name is not UTF-8", "Rename the file.") from error
    if text.startswith(("/", "pipe:")) or "://" in text:
        raise ImageError("outside-root", f"{text}: not a path inside the image folder", "Use relative paths.")
    if "/." not in text and "//" not in text and text[0] not in "./" and not text.endswith("/"):
        return text  # as nearly all are
    parts: list[str] = []
    for part in text.split("/"):
        if part == "..":
            if not parts:
                raise ImageError("outside-root", f"{text}: leads out of the image folder", "Use relative paths.")
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if not parts:
        raise ImageError("outside-root", f"{text}: names the image folder itself")
    return "/".join(parts)


def tombstone(key: str) -> str:
    """Return what stands in the plan for a forgotten image: it holds the key's SHA-256, and is no possible key."""
    return f"/forgotten/{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"
