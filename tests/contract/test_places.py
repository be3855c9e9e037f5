"""One contract for every place a store can lie in: a folder, and a bucket of a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import zarr
from place_support import BUCKET, az, azure_server, s3, s3_server
from proxy_support import Fault, Proxy, Request, first
from store_support import EXECUTION, fill_shard, images, make_store, record

from olaschema import lease
from olaschema.errors import DamagedStoreError, StoreError
from olaschema.layout import receipt_file, shard_file
from olaschema.manifest import ChannelStatistics, RowReceipt
from olaschema.place import Place, open_place
from olaschema.precision import blank
from olaschema.reader import FeatureReader
from olaschema.seal import MANIFEST, seal
from olaschema.store import FeatureStore

__all__ = ["az", "azure_server", "s3", "s3_server"]


@pytest.fixture(params=["folder", "s3", "az"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the test's store goes; another kind of place is another parameter."""
    if request.param == "folder":
        return str(tmp_path / "s")
    request.getfixturevalue(request.param)
    return f"{request.param}://{BUCKET}/{uuid4().hex}/features.zarr"


class TestPlace:
    """What a place promises."""

    def test_names_folders_sizes_and_ranges(self, url: str) -> None:
        place = open_place(url)
        assert not place.present()
        assert place.vacant()
        place.append_log("runs.jsonl", "one")
        assert place.vacant()  # a log is no store
        for name in ("zarr.json", "a/zarr.json", "a/values/c/0", "ab/x"):
            place.publish(name, name.encode())
        assert place.present()
        assert not place.vacant()
        assert place.folders("") == ["_log", "a", "ab"]
        assert place.folders("a") == ["values"]
        assert place.names("a") == ["zarr.json"]
        assert place.names("nowhere") == place.folders("nowhere") == []
        assert sorted(place.walk()) == ["a/values/c/0", "a/zarr.json", "ab/x", "zarr.json"]
        assert (place.exists("ab/x"), place.exists("ab"), place.exists("ab/y")) == (True, False, False)
        assert (place.holds("ab"), place.holds("abc")) == (True, False)
        assert place.size("a/zarr.json") == 11
        assert place.read_range("a/zarr.json", 2, 4) == b"zarr"
        assert place.read_range("a/zarr.json", 7, 100) == b"json"
        assert place.read_tail("a/zarr.json", 4) == (b"json", 11)
        assert place.read_tail("ab/x", 100) == (b"ab/x", 4)
        assert place.find("ab/y") is None
        for read in (place.read, place.size):
            with pytest.raises(StoreError, match="ab/y is missing"):
                read("ab/y")
        place.remove("ab/x")
        place.remove("ab/x")
        assert place.names("ab") == []

    def test_of_many_who_put_at_once_one_wins(self, url: str) -> None:
        place = open_place(url)
        for trial in range(5):
            won: list[int] = []
            start = threading.Barrier(6)

            def put(number: int, trial: int = trial, won: list[int] = won, start: threading.Barrier = start) -> None:
                start.wait()
                if place.publish_if_absent(f"x{trial}", b"%d" % number):
                    won.append(number)

            threads = [threading.Thread(target=put, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [b"%d" % number for number in won] == [place.read(f"x{trial}")]

    def test_a_swap_needs_what_was_read(self, url: str) -> None:
        place = open_place(url)
        assert not place.swap("x", b"old", b"new")
        assert place.swap("x", None, b"1")
        assert not place.swap("x", None, b"2")
        assert not place.swap("x", b"0", b"2")
        assert place.swap("x", b"1", b"2")
        assert place.read("x") == b"2"

    def test_of_many_who_swap_at_once_one_wins(self, url: str) -> None:
        place = open_place(url)
        for trial in range(5):
            won: list[int] = []
            start = threading.Barrier(6)

            def put(number: int, trial: int = trial, won: list[int] = won, start: threading.Barrier = start) -> None:
                start.wait()
                if place.swap(f"x{trial}", None, b"%d" % number):
                    won.append(number)

            threads = [threading.Thread(target=put, args=(number,)) for number in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert [b"%d" % number for number in won] == [place.read(f"x{trial}")]

    def test_withdrawn_folders_are_gone_at_once_and_deleted_in_the_end(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = open_place(url)
        for number in range(3):
            place.publish(f"receipts/depth/{number:05d}.json", b"{}")
        with monkeypatch.context() as patch:  # stopped before any of it is deleted
            patch.setattr(type(place), "_delete_all", _stopped, raising=False)
            if place.remote:
                with pytest.raises(KeyboardInterrupt):
                    place.withdraw("receipts/depth")
            else:
                place.withdraw("receipts/depth")
        assert not place.holds("receipts/depth")
        assert place.names("receipts/depth") == []
        assert open_place(url).clear_withdrawn()
        assert list(place.walk()) == []
        assert not place.clear_withdrawn()

    def test_locks_exclude_each_other(self, url: str) -> None:
        place, inside, most = open_place(url), [0], [0]

        def work() -> None:
            for _ in range(3):
                with place.lock("plan"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.01)
                    inside[0] -= 1

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]

    def test_logs_keep_the_order_of_their_lines(self, url: str) -> None:
        place = open_place(url)
        place.append_log("errors.log", "first")
        place.append_log("errors.log", "second \udc80")
        assert place.read_log("errors.log").splitlines() == [b"first", b"second \\udc80"]
        assert "errors.log" in place.logs()
        assert place.read_log("nothing.log") == b""


def _unreachable(*arguments: object) -> bool:
    raise StoreError("the server does not answer", "Try again.")


def _stopped(*arguments: object) -> None:
    raise KeyboardInterrupt


class TestStore:
    """What a store promises, wherever it lies."""

    @pytest.mark.parametrize("precision", ["float16", "int4"])
    def test_rows_come_back_and_plain_zarr_agrees(self, url: str, precision: str) -> None:
        store, teacher, features = make_store(url, count=6, precision=precision)
        again = FeatureStore.open(url)
        assert again.teachers() == ["depth"]
        assert [sample.key for sample in again.samples()] == [f"{i:04d}.jpg" for i in range(6)]
        reader = FeatureReader(again, "depth")
        for row in range(6):
            np.testing.assert_array_equal(reader.feature(row), features[row])
        group = zarr.open_group(_for_zarr(url), mode="r")["depth"]
        for row in range(6):
            for name, array in reader.read(row).arrays.items():
                np.testing.assert_array_equal(np.asarray(group[name][row]), array)
        with pytest.raises(StoreError, match="row 6 has no depth feature"):
            reader.read(6)
        store.put_teacher(teacher)  # nothing changes

    def test_the_bytes_are_those_of_a_folder(self, url: str, tmp_path: Path) -> None:
        store, _, _ = make_store(url, count=6)
        seal(store, ["depth"])
        folder = tmp_path / "folder"
        here, _, _ = make_store(folder, count=6)
        seal(here, ["depth"])
        names = sorted(here.place.walk())
        assert sorted(store.place.walk()) == names
        assert MANIFEST in names
        for name in names:
            assert store.place.read(name) == (folder / name).read_bytes(), name

    def test_a_late_writer_changes_nothing(self, url: str) -> None:
        store, teacher, features = make_store(url, count=4)
        fill_shard(store, teacher, 0, np.full((4, 3, 3, 5), 7, np.float32))
        np.testing.assert_array_equal(FeatureReader(FeatureStore.open(url), "depth").feature(1), features[1])

    def test_a_flipped_bit_is_found_by_the_read_that_uses_it(self, url: str) -> None:
        store, _, _ = make_store(url, count=4)
        name = shard_file("depth", 0, 4)
        data = bytearray(store.place.read(name))
        for position in (0, len(data) // 2, len(data) - 1):
            changed = bytearray(data)
            changed[position] ^= 16
            store.place.publish(name, bytes(changed))
            with pytest.raises(DamagedStoreError):
                for row in range(4):
                    FeatureReader(FeatureStore.open(url), "depth").read(row)
        store.place.publish(name, bytes(data[:-3]))
        with pytest.raises(DamagedStoreError, match="its receipt promises"):
            FeatureReader(FeatureStore.open(url), "depth").read(0)

    def test_what_is_no_store_is_refused(self, url: str) -> None:
        with pytest.raises(StoreError, match="no such feature store"):
            FeatureStore.open(url)
        open_place(url).publish("notes.txt", b"mine")
        with pytest.raises(StoreError, match="is not a feature store"):
            FeatureStore.create(url)

    def test_growth_rewrites_no_shard(self, url: str) -> None:
        store, teacher, _ = make_store(url, count=6)
        name = shard_file("depth", 1, 4)
        before = store.place.read(name), store.place.read(receipt_file("depth", 1))
        store.add_generation(images(2, start=6))
        store.put_teacher(teacher)
        fill_shard(store, teacher, 2, np.ones((2, 3, 3, 5), np.float32))
        assert (store.place.read(name), store.place.read(receipt_file("depth", 1))) == before
        assert [row.row for row in FeatureStore.open(url).samples()] == [0, 1, 2, 3, 4, 5, 8, 9]


def _for_zarr(url: str) -> object:
    if "://" not in url:
        return url
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    return ObjectStore(from_url(url, client_options={"allow_http": True}), read_only=True)


def test_stamps_tell_what_was_published_again(url: str) -> None:
    place = open_place(url)
    place.publish("receipts/depth/0.json", b"one")
    place.publish("receipts/depth/1.json", b"two")
    place.publish("receipts/depth/deeper/2.json", b"not directly there")
    before = place.stamps("receipts/depth")
    assert before.keys() == {"0.json", "1.json"}
    assert all(before.values())
    place.publish("receipts/depth/1.json", b"another")
    after = place.stamps("receipts/depth")
    assert after["0.json"] == before["0.json"]
    assert after["1.json"] != before["1.json"]
    assert place.stamps("receipts/gen") == {}


class TestLease:
    """Who writes now."""

    def test_it_keeps_others_out_until_it_is_given_back(self, url: str) -> None:
        place = open_place(url)
        with lease.writing(place, ["depth"], wait=False):
            with pytest.raises(StoreError, match=r"leases/depth: .* process \d+ is writing there now"):
                lease.Lease(open_place(url), "_log/leases/depth", 60).acquire(wait=False)
            with lease.writing(open_place(url), ["gen"], wait=False):
                pass  # another teacher
        with lease.writing(open_place(url), ["depth"], wait=False):
            pass

    def test_that_of_a_stranger_expires_and_a_renewed_one_does_not(self, url: str) -> None:
        place, file = open_place(url), "_log/leases/depth"
        stranger = {"owner": "x", "host": "elsewhere", "machine": "other", "pid": 1, "started": "1", "term": 0.6}
        place.publish(file, json.dumps(stranger).encode())
        begun = time.monotonic()
        said: list[str] = []
        with lease.hold(place, file, say=said.append, term=0.6):
            assert 0.6 <= time.monotonic() - begun < 10
            waiting = lease.Lease(open_place(url), file, 0.6)
            with pytest.raises(StoreError):
                waiting.acquire(wait=False)
            time.sleep(1.0)  # longer than its term: it is renewed meanwhile
            with pytest.raises(StoreError):
                waiting.acquire(wait=False)
        assert "waiting for elsewhere process 1" in said[0]

    def test_one_who_does_not_wait_watches_a_stranger_for_a_term(self, url: str) -> None:
        place, file = open_place(url), "_log/leases/depth"
        stranger = {"owner": "x", "host": "elsewhere", "machine": "another boot", "pid": 1, "started": "1", "term": 0.6}
        place.publish(file, json.dumps(stranger).encode())
        begun = time.monotonic()
        said: list[str] = []
        with lease.hold(place, file, wait=False, say=said.append, term=0.6):
            assert time.monotonic() - begun >= 0.6
        assert "elsewhere process 1, which may have died" in said[0]
        place.publish(file, json.dumps(stranger | {"term": 60}).encode())
        renewing = threading.Timer(0.5, place.publish, (file, json.dumps(stranger | {"renewals": 2}).encode()))
        renewing.start()
        with pytest.raises(StoreError, match="elsewhere process 1 is writing there now"):
            lease.Lease(place, file, 60).acquire(wait=False)
        renewing.join()

    def test_that_of_a_killed_process_is_taken_over_at_once(self, url: str) -> None:
        code = (
            "import sys, time\nfrom olaschema import lease\nfrom olaschema.place import open_place\n"
            "with lease.writing(open_place(sys.argv[1]), ['depth'], wait=False):\n"
            "    sys.stdout.write('held\\n'); sys.stdout.flush(); time.sleep(60)\n"
        )
        holder = subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=f"process {holder.pid} is writing"):
                lease.Lease(open_place(url), "_log/leases/depth", 60).acquire(wait=False)
        finally:
            holder.kill()
            holder.wait()
        holder.stdout.close()
        begun = time.monotonic()
        with lease.writing(open_place(url), ["depth"], wait=False):
            assert time.monotonic() - begun < 5

    def test_that_of_a_process_whose_number_another_one_has_now_is_taken_at_once(self, tmp_path: Path) -> None:
        place, file = open_place(tmp_path / "s"), "_log/leases/depth"
        holder = {"owner": "x", "host": "here", "machine": lease._machine(), "pid": os.getpid(), "term": 60}
        place.publish(file, json.dumps(holder | {"started": lease._started(os.getpid())}).encode())
        with pytest.raises(StoreError, match="is writing there now"):
            lease.Lease(place, file, 60).acquire(wait=False)
        place.publish(file, json.dumps(holder | {"started": "1"}).encode())
        with lease.hold(place, file, wait=False):
            pass

    def test_one_that_cannot_be_renewed_or_was_taken_is_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = open_place(tmp_path / "s")
        long, short = (lease.hold(place, f"_log/leases/{name}", term=term) for name, term in (("a", 60), ("b", 0.4)))
        with long as kept, short as held, monkeypatch.context() as patch:
            patch.setattr(type(place), "swap", _unreachable)
            time.sleep(0.6)
            assert (kept.lost, held.lost) == (False, True)
            patch.undo()
        with lease.hold(place, "_log/leases/c", term=2) as held:
            place.publish("_log/leases/c", b'{"owner": "another"}')
            deadline = time.monotonic() + 1.9
            while not held.lost and time.monotonic() < deadline:
                time.sleep(0.02)
            assert time.monotonic() < deadline  # known at the next renewal, before the term is over
        assert place.read("_log/leases/c") == b'{"owner": "another"}'

    def test_nothing_is_written_under_a_lock_that_expired(self, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        place = open_place(f"s3://{BUCKET}/{uuid4().hex}")
        with place.lock("plan"):
            place.publish("x", b"1")
            monkeypatch.setattr(lease.Lease, "lost", True)
            with pytest.raises(StoreError, match="its lock has expired"):
                place.publish("x", b"2")
        assert place.read("x") == b"1"


class TestBrokenConnections:
    """An S3 server behind a proxy that breaks what it is told to."""

    @pytest.fixture
    def broken(self, s3: str, monkeypatch: pytest.MonkeyPatch) -> Proxy:
        with Proxy(s3) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            yield proxy

    def _place(self) -> Place:
        return open_place(f"s3://{BUCKET}/{uuid4().hex}")

    def test_half_an_upload_publishes_nothing(self, broken: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
        place = self._place()
        broken.fault = lambda request: Fault("half-upload") if request.method == "PUT" else None
        with pytest.raises(StoreError, match=r"the connection to http.* fails or stalls"):
            place.publish("depth/values/c/0", bytes(1 << 20))
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
        assert not open_place(place.url).present()

    @pytest.mark.parametrize(
        "fault",
        [Fault("half-upload"), Fault("lose-reply"), Fault("status", 503), Fault("refuse")],
        ids=lambda f: f.kind,
    )
    def test_passing_faults_are_tried_again(self, broken: Proxy, fault: Fault) -> None:
        place = self._place()
        broken.fault = first(2, fault, _is_put)
        place.publish("x", bytes(1000))
        broken.fault = first(2, fault, _is_put)
        assert place.publish_if_absent("y", b"mine")
        assert not place.publish_if_absent("y", b"another's")
        assert (place.read("x"), place.read("y")) == (bytes(1000), b"mine")

    @pytest.mark.parametrize("fault", [Fault("truncate"), Fault("status", 500), Fault("refuse")], ids=lambda f: f.kind)
    def test_reads_come_whole_or_not_at_all(self, broken: Proxy, fault: Fault) -> None:
        place = self._place()
        data = np.random.default_rng(0).bytes(100_000)
        place.publish("x", data)
        broken.fault = first(1, fault, lambda request: request.method == "GET")
        assert place.read("x") == data
        broken.fault = first(1, fault, lambda request: request.method == "GET")
        assert place.read_range("x", 10, 50_000) == data[10:50_010]
        for listing in (lambda: place.names(""), lambda: list(place.stamps("")), lambda: list(place.walk())):
            broken.fault = first(1, fault, lambda request: request.method == "GET")
            assert listing() == ["x"]

    @pytest.mark.parametrize("fault", [Fault("truncate"), Fault("status", 500), Fault("refuse")], ids=lambda f: f.kind)
    def test_an_answer_that_nothing_is_there_comes_whole_too(self, broken: Proxy, fault: Fault) -> None:
        place = self._place()
        for asked in (lambda: place.find("x"), lambda: place.exists("x") or None):
            broken.fault = first(1, fault)
            assert asked() is None
        broken.fault = first(1, fault)
        with pytest.raises(StoreError, match="x is missing"):
            place.read_range("x", 0, 1)
        broken.fault = first(1, fault)
        with place.lock("shard"):
            pass
        assert place.find("_log/locks/shard") == b"{}"

    def test_a_listing_that_never_comes_whole_is_an_error(self, broken: Proxy) -> None:
        place = self._place()
        place.publish("x", b"")
        broken.fault = lambda request: Fault("truncate") if request.method == "GET" else None
        with pytest.raises(StoreError, match=r"the connection to .* fails or stalls"):
            place.names("")

    def test_errors_name_thing_and_remedy_without_credentials(
        self, broken: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-sesame")
        broken.fault = lambda request: Fault("status", 403)
        for act in (lambda p: p.read("zarr.json"), lambda p: p.publish("x", b""), lambda p: p.names("samples")):
            with pytest.raises(StoreError, match="access was refused") as caught:
                act(self._place())
            assert "AWS_ACCESS_KEY_ID" in caught.value.remedy
            assert "sesame" not in str(caught.value)
        broken.fault = lambda request: None
        for act in (lambda p: p.read("zarr.json"), lambda p: p.publish("x", b""), lambda p: p.present()):
            with pytest.raises(StoreError, match="there is no bucket 'another-bucket'"):
                act(open_place("s3://another-bucket/x"))
        with pytest.raises(StoreError, match=r"s3://features/x: the address holds more") as caught:
            open_place("s3://key:sesame@features/x")
        assert "sesame" not in str(caught.value)
        with pytest.raises(StoreError, match="no stores are read from such an address"):
            open_place("ftp://x/y")

    def test_small_files_take_one_request_however_many_rows_are_read(self, broken: Proxy) -> None:
        place = self._place()
        make_store(place.url, count=8, precision="int8", rows_per_shard=8)
        store = FeatureStore.open(place.url)
        reader = FeatureReader(store, "depth")
        before = broken.requests["GET"]
        for row in range(8):
            reader.read(row)
        # one receipt, and the files of values, scale and offset
        assert broken.requests["GET"] - before == 4


def _is_put(request: Request) -> bool:
    return request.method == "PUT"


def test_a_forked_process_is_told_rather_than_left_hanging(s3: str) -> None:
    import multiprocessing

    place = open_place(f"s3://{BUCKET}/{uuid4().hex}")
    place.publish("x", b"1")
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(place.url, sender))
    child.start()
    assert receiver.poll(20)
    assert "before this process was forked" in receiver.recv()
    child.join()


def _read_in_child(url: str, sender: object) -> None:
    try:
        open_place(url).read("x")
        sender.send("read")  # type: ignore[attr-defined]
    except StoreError as error:
        sender.send(str(error))  # type: ignore[attr-defined]


def test_an_uncommitted_shard_is_no_data(url: str) -> None:
    """Values without a receipt are nobody's: what a job that was killed has put is replaced or adopted."""
    store = FeatureStore.create(url, rows_per_shard=2)
    store.add_generation(images(2))
    teacher = record()
    store.put_teacher(teacher)
    store.place.publish(shard_file("depth", 0, 4), b"half of something")
    assert FeatureReader(FeatureStore.open(url), "depth").status(0) is None
    stored = blank(2, teacher.fingerprint.shape, "float16")
    rows = [RowReceipt(status="failed", reason="missing")] * 2
    store.commit_shard(teacher, 0, stored, rows, ChannelStatistics(5), EXECUTION)
    status = FeatureReader(FeatureStore.open(url), "depth").status(0)
    assert status is not None
    assert status.reason == "missing"
