"""`extract --format webdataset`: tars are packed while the job runs, from a working store under `_log` of their folder.

Receipts, leases, resume and all else of the job are those of the working store, so nothing about a job is new here. A
shard's arrays are deleted when the last tar made of them is there; its receipts stay. A tar that is damaged or missing
afterwards is mended by a rerun: the receipts of its shards are taken away, so that they are extracted again.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from olapipe.config import ExtractConfig
from olapipe.corpus import Growth
from olapipe.pack import LOCK, Packed, Packer, require_ours
from olapipe.packplan import plan_pack
from olaschema.errors import StoreError
from olaschema.layout import receipt_file
from olaschema.place import absolute_url, open_place
from olaschema.store import FeatureStore
from olaschema.tarshard import ROOT, require_nameable

WORKING = "_log/store"
_TAR = re.compile(r"\d{6}\.tar")


def working(config: ExtractConfig) -> ExtractConfig:
    """Return the settings of the job that writes the working store."""
    return config.model_copy(update={"out": f"{absolute_url(config.out)}/{WORKING}", "format": "zarr"})


class DirectSet:
    """The packed set that a job writes. `root` is the folder that keys are relative to.

    Raises StoreError where the folder holds something else, or a teacher's name cannot be part of a member's.
    """

    def __init__(self, config: ExtractConfig, root: Path) -> None:
        for name in config.teachers:
            require_nameable(name)
        self._place = open_place(config.out)
        require_ours(self._place)
        self._teachers = config.teachers
        self._conversations = config.corpus if config.images is not None else None
        self._root = root

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep everybody else out, `olapipe pack` included."""
        with self._place.lock(LOCK):
            self._place.sweep()
            yield

    def reopen(self, store: FeatureStore | None, growth: Growth, say: Callable[[str], None]) -> None:
        """Refuse what a set that was begun cannot become, and see to it that what is gone is extracted again."""
        url = self._place.url
        if not any(_TAR.fullmatch(name) for name in self._place.names("")) and not self._place.exists(ROOT):
            return  # nothing was packed, so nothing is gone
        elsewhere = "Choose a new folder. A feature store (without --format) can grow, and be packed then."
        if store is None or not store.generations():
            raise StoreError(f"{url} holds a packed set without the working store that it was made from", elsewhere)
        present = store.teachers()
        if set(present) != set(self._teachers):
            raise StoreError(
                f"{url} is packed with the teachers {', '.join(present)}: it gets no others, and loses none", elsewhere
            )
        if growth.new:
            raise StoreError(f"{url} is packed, and {len(growth.new)} images of the corpus are not in it", elsewhere)
        packer = self._packer(store)
        shards = {shard for number in packer.missing() for shard in packer.plan.shards(number)}
        again = [shard for shard in sorted(shards) if self._take_back(store, shard)]
        if again:
            say(f"shards to extract again for tars that are missing, damaged or of other conversations: {len(again)}")

    @contextmanager
    def packing(self, store: FeatureStore) -> Iterator[Packing]:
        """Pack in the background what is complete; what is under way at the end is finished, the rest is left."""
        own = FeatureStore.open(store.url)  # a thread has it to itself
        pool = ThreadPoolExecutor(1, thread_name_prefix="pack")
        try:
            yield Packing(own, self._teachers, self._packer(own), pool)
        finally:
            pool.shutdown(cancel_futures=True)

    def _packer(self, store: FeatureStore) -> Packer:
        plan = plan_pack(store, self._conversations)
        return Packer(store, self._teachers, self._root, self._place, plan)

    def _take_back(self, store: FeatureStore, shard: int) -> bool:
        """Take away the receipts of a shard whose arrays are gone; says whether there were any."""
        taken = False
        for name in self._teachers:
            receipt = store.receipt(name, shard)
            if receipt is not None and not all(store.place.exists(file) for file in receipt.files):
                store.place.remove(receipt_file(name, shard))
                taken = True
        return taken


class Packing:
    """Packs each tar as soon as every teacher has committed its shards. Made by `DirectSet.packing`."""

    def __init__(
        self, store: FeatureStore, teachers: tuple[str, ...], packer: Packer, pool: ThreadPoolExecutor
    ) -> None:
        self._store = store
        self._teachers = teachers
        self._packer = packer
        self._pool = pool
        self._futures: list[Future[None]] = []
        self._lacking: dict[int, set[int]] = {}
        """By tar the shards that are not committed yet."""
        self._tars: defaultdict[int, list[int]] = defaultdict(list)
        """By shard the tars that wait for it."""
        self._uses: Counter[int] = Counter()
        """By shard how many tars are still to be made of it."""
        done = set.intersection(*(set(store.committed(name)) for name in teachers))
        for number in packer.missing():
            shards = packer.plan.shards(number)
            self._uses.update(shards)
            self._lacking[number] = set(shards) - done
            for shard in self._lacking[number]:
                self._tars[shard].append(number)
        self._begin([number for number, lacking in self._lacking.items() if not lacking])

    def shard_done(self, shard: int) -> None:
        """Take note of a shard that all teachers have committed; raises what went wrong in packing meanwhile."""
        self._raise_errors()
        tars = self._tars.pop(shard, [])
        for number in tars:
            self._lacking[number].discard(shard)
        self._begin([number for number in tars if not self._lacking[number]])

    def finish(self) -> Packed | None:
        """Wait for all tars that can be made and write the root document; None where shards are lacking."""
        for future in self._futures:
            future.result()
        if self._lacking:
            return None
        packed = self._packer.finish()
        for name in self._teachers:  # what a killed run has left
            for array in self._store.array_names(name):
                self._store.place.withdraw(f"{name}/{array}/c")
        self._store.place.clear_withdrawn()
        return packed

    def _begin(self, tars: list[int]) -> None:
        for number in tars:
            del self._lacking[number]
            self._futures.append(self._pool.submit(self._bring, number))

    def _bring(self, number: int) -> None:
        self._packer.bring(number)
        for shard in self._packer.plan.shards(number):
            self._uses[shard] -= 1
            if not self._uses[shard]:
                self._delete(shard)

    def _delete(self, shard: int) -> None:
        for name in self._teachers:
            receipt = self._store.receipt(name, shard)
            for file in receipt.files if receipt is not None else ():
                self._store.place.remove(file)

    def _raise_errors(self) -> None:
        """Raise the error of a tar that is done with; drop those that are."""
        for future in [future for future in self._futures if future.done()]:
            future.result()
            self._futures.remove(future)
