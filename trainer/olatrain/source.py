"""What a run streams from: conversations, images and features, however they are laid out.

`Data` answers what a run asks before its first step, in the main process; `Data.open` gives what a loader process
reads samples through. Of both there are two kinds: a feature store beside a folder of images (`storedata`), and a
packed training set, which holds everything (`packeddata`). The order of samples and all that follows from it is made of
a `Listing` alone, so it does not depend on the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from olaschema.basis import Basis
from olaschema.errors import CorpusError, StoreError
from olaschema.manifest import ChannelStatistics, RowReceipt, TeacherRecord
from olaschema.precision import Stored
from olatrain.conversations import Conversations
from olatrain.join import Coverage, Listing


def require_same_form(record: TeacherRecord, other: TeacherRecord, *, mine: str, theirs: str, remedy: str) -> None:
    """Raise StoreError where features of one meaning are stored in two forms: arrays of one do not decode the other."""
    name = record.fingerprint.teacher
    if other.precision != record.precision:
        problem = f"{name} is stored as {record.precision} {mine}, as {other.precision} {theirs}"
    elif other.centred != record.centred:
        problem = (
            f"{name} is stored as {record.precision} {mine} and {theirs}, but in only one of them with offsets; "
            "the other is of an earlier version"
        )
    elif other.basis != record.basis:
        problem = f"{name} is stored in one basis {mine}, in another {theirs}"
    else:
        return
    raise StoreError(problem, remedy)


class Opened(Protocol):
    """Images and features by the places that a `Listing` gives; -1 is nowhere."""

    @property
    def requests(self) -> int:
        """How often files were asked for."""

    def image(self, place: int, key: str) -> bytes:
        """Return an image's bytes; raises ImageError for a reason to skip it, StoreError for damage."""

    def status(self, teacher: str, place: int) -> RowReceipt | None:
        """What became of an image under a teacher; None where nothing was tried."""

    def describe(self, place: int) -> str:
        """Name an image for a message."""

    def feature(self, teacher: str, place: int) -> Stored | None:
        """Return a feature as it is stored, None where there is none; raises StoreError for damage."""


class Data(Protocol):
    """Where samples come from. It can be sent to another process, and holds nothing open."""

    @property
    def url(self) -> str:
        """Where the features are, for messages."""

    @property
    def remote(self) -> bool:
        """Whether they come over a network."""

    def teacher(self, name: str) -> TeacherRecord:
        """Return what is recorded of a teacher; raises StoreError naming those present."""

    def basis(self, name: str) -> Basis | None:
        """Return what a teacher's features are decoded by, None where they need nothing; raises DamagedStoreError."""

    def statistics(self, name: str) -> ChannelStatistics:
        """Return the channel statistics of a teacher's features."""

    def conversations(self) -> Conversations:
        """Return the conversations to train on; raises CorpusError."""

    def listing(self, conversations: Conversations) -> Listing:
        """Find the images of conversations, which may be others than those to train on."""

    def coverage(self, listing: Listing, teacher: str) -> Coverage:
        """Count which samples have a feature of `teacher`."""

    def require_images(self, listing: Listing) -> None:
        """Raise CorpusError where it is plain that the images are not to be found."""

    def notes(self) -> list[str]:
        """What a user should know before the first step."""

    def open(self) -> Opened:
        """Return what reads samples, in the process that calls this."""


def require_features(coverages: Mapping[str, Coverage], url: str) -> None:
    """Raise CorpusError naming the teacher that has no feature for any sample."""
    for teacher, found in coverages.items():
        if not found.valid:
            reasons = (
                ", ".join(f"{count} {reason}" for reason, count in found.missing.items()) or "no sample has an image"
            )
            raise CorpusError(
                f"{url}: {teacher} has no feature for any sample ({reasons})",
                "Keys are paths relative to the image folder: check that the conversations name images as the "
                "extraction did, and that it has finished.",
            )
