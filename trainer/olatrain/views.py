"""The view contract: teacher and student must look at the same part of an image."""

from __future__ import annotations

from collections.abc import Iterable

from olaschema.errors import ViewError
from olaschema.manifest import Fingerprint, View


def view_mismatches(fingerprints: Iterable[Fingerprint], student: View) -> list[str]:
    """Describe in words each teacher whose picture the student's view does not answer to; empty where all agree."""
    found = []
    turned: dict[bool, list[str]] = {}
    for fingerprint in fingerprints:
        view = fingerprint.preprocessing.view
        turned.setdefault(fingerprint.preprocessing.exif, []).append(fingerprint.teacher)
        if not student.accepts(view, spatial=fingerprint.grid is not None):
            found.append(f"{fingerprint.teacher} saw {view.describe()}, the student sees {student.describe()}")
    if len(turned) == 2:
        found.append(
            f"{', '.join(turned[True])} saw images turned upright by their EXIF data, "
            f"{', '.join(turned[False])} saw them as stored; the student sees one of the two"
        )
    return found


def require_views(fingerprints: Iterable[Fingerprint], student: View, *, allow: bool) -> list[str]:
    """Return the mismatches if they are allowed; raises ViewError naming both pictures if they are not."""
    found = view_mismatches(fingerprints, student)
    if found and not allow:
        raise ViewError(
            "; ".join(found),
            "Compose the student with the teachers' view (`olatrain compose --view`), extract with the student's, "
            "or accept it with --allow-view-mismatch, as the published recipe does.",
        )
    return found


def require_fed_views(fed: Iterable[Fingerprint], student: View, *, exif: bool) -> None:
    """Raise ViewError unless the fed features show what the student sees: the same picture, or a vector of a part.

    `exif` says whether the student turns images upright. No flag allows another view: the student would be given what
    is not in its image, and a comparison with it would say nothing.
    """
    found = view_mismatches(fed, student)
    found += [
        f"{fingerprint.teacher} saw images {'upright' if fingerprint.preprocessing.exif else 'as stored'}, the student "
        "does not"
        for fingerprint in fed
        if fingerprint.preprocessing.exif is not exif
    ]
    if found:
        raise ViewError(
            f"features to feed are not of the student's own view: {'; '.join(found)}",
            "Compose the student with the teachers' view (`olatrain compose --view`), or extract with the student's.",
        )


def student_exif(fingerprints: Iterable[Fingerprint]) -> bool:
    """Whether the student turns images upright by their EXIF data: as the teachers did.

    Yes where they disagree, and without any.
    """
    turned = [fingerprint.preprocessing.exif for fingerprint in fingerprints]
    return any(turned) or not turned
