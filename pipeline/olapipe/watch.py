"""Who is told how a job gets on: the terminal, and the note in the store that `olapipe status` reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from olapipe.bottleneck import busy
from olapipe.config import ExtractConfig
from olapipe.progress import Reporter
from olapipe.signals import Terminated
from olapipe.status import STOPPED, Heartbeat, State
from olapipe.tally import Tally
from olaschema.place import Place

_ENDING = {
    "SIGINT": "stopping: what is in flight is finished first; Ctrl-C again stops at once",
    "SIGTERM": "stopping: what is in flight is finished first; SIGTERM again stops at once",
    "max-failures": "too many failed images; what is in flight is finished",
}


@contextmanager
def watched(
    place: Place, reporter: Reporter, config: ExtractConfig, before: Mapping[str, int], waiting: Mapping[str, int]
) -> Iterator[Callable[[Tally], None]]:
    """Yield what is to be called with a job's tally, about twice a second.

    `before` and `waiting` are by teacher the images done in earlier runs, and those that this one has to do.
    """
    heart = Heartbeat(place, waiting)
    started = time.monotonic()
    seen = Tally()
    said = False

    def watch(tally: Tally) -> None:
        nonlocal seen, said
        seen = tally
        if tally.stopped is not None and not said:
            said = True
            reporter.say(f"{_ENDING[tally.stopped]} ({tally.in_flight} shards)")
        spent = time.monotonic() - started
        reporter.stages(busy(tally.seconds, spent, max(tally.workers, 1), config.decoders))
        reporter.update({name: before[name] + tally.settled[name] for name in before}, tally.failed)
        heart.beat(tally)

    heart.beat(seen)
    state: State = "ended by an error"
    try:
        yield watch
        state = "finished" if seen.stopped is None else STOPPED[seen.stopped]
    except KeyboardInterrupt as error:  # the second signal, or one that came where nothing was in flight
        state = STOPPED["SIGTERM" if isinstance(error, Terminated) else "SIGINT"]
        raise
    finally:
        reporter.end()
        heart.end(state)
