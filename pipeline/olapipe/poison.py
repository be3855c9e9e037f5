"""Which images of a shard kill the worker, or make the teacher raise: each is tried alone. No Ray in here."""

from __future__ import annotations

from collections import deque

from olapipe.tally import ShardTask

# Whatever is killed from outside in the very moment that an innocent image is tried must not count against it.
_DEATHS = 2
# With more of them in one shard it is the teacher or the machine that is broken, not the images.
_MOST = 8


class Suspects:
    """The images of a shard that lost its workers, in the order in which they are tried, by teacher."""

    def __init__(self, task: ShardTask) -> None:
        self._known = {name: dict(rows) for name, rows in task.poisoned.items()}
        self._left = deque(
            (name, row) for name in task.teachers for row in range(task.rows) if row not in self._known.get(name, {})
        )
        self._deaths = 0
        self.found = 0

    @property
    def done(self) -> bool:
        """Whether no image is left to try."""
        return not self._left

    @property
    def hopeless(self) -> bool:
        """Whether so many images are to blame that it cannot be the images."""
        return self.found > _MOST

    def next(self) -> tuple[str, int]:
        """Return the teacher and the row of the shard to try now."""
        return self._left[0]

    def survived(self) -> None:
        """The present image is innocent."""
        self._left.popleft()
        self._deaths = 0

    def blame(self, reason: str) -> None:
        """Take note that the present image ended with `reason`; a death counts when it happens twice."""
        if reason == "crashed":
            self._deaths += 1
            if self._deaths < _DEATHS:
                return
        name, row = self._left.popleft()
        self._known.setdefault(name, {})[row] = reason
        self._deaths = 0
        self.found += 1

    def poisoned(self) -> dict[str, dict[int, str]]:
        """Return by teacher the rows to leave out, with their reasons."""
        return self._known
