"""Errors a user can act on: each names the thing, the constraint and the remedy."""

from __future__ import annotations


class OlaError(Exception):
    """Something the user can mend; the commands print it without a traceback and exit with `exit_code`.

    `problem` names the thing and what is wrong with it; `remedy` says what to change.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}" if self.remedy else self.problem


class ConfigError(OlaError):
    """A setting is unknown, of the wrong type, or contradicts another; raised before any work starts."""

    exit_code = 2


class CorpusError(OlaError):
    """The corpus as a whole cannot be used: missing, empty, not readable as what it claims to be."""

    exit_code = 2


class TeacherError(OlaError):
    """A teacher is unknown, or its checkpoint cannot be loaded as that teacher."""

    exit_code = 2


class StoreError(OlaError):
    """A feature store cannot be opened, written or read as asked."""


class DamagedStoreError(StoreError):
    """Bytes in a store are not the bytes its receipts promise."""


class FingerprintError(StoreError):
    """Two features that mean different things were about to be mixed; the differing fields are named."""


class ViewError(OlaError):
    """Teacher and student see different parts of the image."""

    exit_code = 2


class ImageError(OlaError):
    """One image cannot be used. `reason` is a short stable code that reports group by.

    Reasons: missing, unreadable, empty, not-an-image, truncated, too-large, changed, outside-root,
    bad-name, not-finite, overflow, crashed, teacher-failed.
    """

    def __init__(self, reason: str, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.args = (reason, problem, remedy)  # so that the error survives pickling between processes
        self.reason = reason
