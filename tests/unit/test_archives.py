"""Corpora of tar and parquet files: what they list, what of them can be read, and what damage becomes of."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives_support import write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_support import image_bytes, write_images

from olapipe.corpora.entry import Entry
from olapipe.corpus import list_corpus, read_image
from olaschema.errors import CorpusError, ImageError
from olaschema.rooted import is_rooted, read_rooted
from olaschema.tarindex import Member, TarDamage, members


def _walk(path: Path) -> list[Member]:
    handle = os.open(path, os.O_RDONLY)
    try:
        return list(members(handle))
    finally:
        os.close(handle)


def _reason(root: Path, entry: Entry) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        read_image(root, entry.sample(), 10**6)
    assert str(root) not in caught.value.problem
    return caught.value.reason, caught.value.problem


def test_tar_files_in_img2dataset_layout(tmp_path: Path) -> None:
    write_tar(tmp_path / "00001.tar", {"000010000.jpg": b"c"})
    write_tar(tmp_path / "00000.tar", {"000000001.jpg": b"bb", "000000001.json": b"{}", "./000000000.JPG": b"a"})
    (tmp_path / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "00000.parquet")  # img2dataset's metadata
    listing = list_corpus(tmp_path, None)
    entries = list(listing.entries)
    assert [(e.key, e.size) for e in entries] == [
        ("00000.tar/000000001.jpg", 2), ("00000.tar/000000000.JPG", 1), ("00001.tar/000010000.jpg", 1),
    ]  # fmt: skip
    assert [read_image(tmp_path, entry.sample(), 1000) for entry in entries] == [b"bb", b"a", b"c"]
    assert listing.passed_over == {".tar": 0, ".parquet": 1}
    # one file alone has the keys it has among others
    assert list(list_corpus(tmp_path / "00001.tar", None).entries) == entries[2:]


def test_images_come_before_archives_that_lie_beside_them(tmp_path: Path) -> None:
    write_images(tmp_path, "z/a.png")
    write_tar(tmp_path / "a.tar", {"x.png": b"x"})
    listing = list_corpus(tmp_path, None)
    assert [entry.key for entry in listing.entries] == ["z/a.png"]
    assert listing.passed_over == {".tar": 1, ".parquet": 0}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(alphabet="abé/x.", min_size=1, max_size=160).filter(lambda t: t.strip("/")),
            st.binary(max_size=1200),
            st.sampled_from((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)),
        ),
        max_size=8,
    ),
    st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)),
)
def test_members_are_those_that_tarfile_finds(tmp_path: Path, files: list[tuple[str, bytes, bytes]], form: int) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, data, kind in files:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "y" * 130 if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(data) if info.size else None)
    with tarfile.open(path) as tar:
        expected = [(m.name.rstrip("/"), m.offset_data, m.size, m.isreg()) for m in tar if not m.isdir()]
    found = [(m.name.rstrip("/"), m.offset, m.size, m.regular) for m in _walk(path)]
    assert found == expected


def test_a_tar_file_that_is_cut_short_gives_what_is_whole_and_names_the_rest(tmp_path: Path) -> None:
    whole = {"a.png": image_bytes(0), "b.png": image_bytes(1), "c.png": image_bytes(2)}
    write_tar(tmp_path / "t.tar", whole)
    path = tmp_path / "t.tar"
    data = path.read_bytes()
    third = _walk(path)[2].offset

    path.write_bytes(data[: third + 100])  # inside the data of c
    entries = list(list_corpus(tmp_path, None).entries)
    assert [entry.key for entry in entries][:3] == ["t.tar/a.png", "t.tar/b.png", "t.tar/c.png"]
    assert read_image(tmp_path, entries[1].sample(), 10**6) == whole["b.png"]
    assert _reason(tmp_path, entries[2])[0] == "truncated"
    assert len(entries) == 4 and _reason(tmp_path, entries[3])[0] == "truncated"

    path.write_bytes(data[: third - 300])  # inside the header of c
    entries = list(list_corpus(tmp_path, None).entries)
    assert [entry.key for entry in entries] == ["t.tar/a.png", "t.tar/b.png", f"t.tar/damaged-at-{third - 512}"]
    reason, problem = _reason(tmp_path, entries[2])
    assert reason == "truncated" and f"byte {third - 512}" in problem

    spoilt = bytearray(data)
    spoilt[third - 512] ^= 1  # a letter of c's name: the checksum is wrong
    path.write_bytes(spoilt)
    entries = list(list_corpus(tmp_path, None).entries)
    assert [entry.key for entry in entries][2:] == [f"t.tar/damaged-at-{third - 512}"]
    assert "checksum" in _reason(tmp_path, entries[2])[1]


def test_members_outside_links_and_repeated_names(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("../up.png", b"1"), ("/etc/abs.png", b"2"), ("a.png", b"first"), ("a.png", b"second!")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    listing = list_corpus(tmp_path, None)
    entries = list(listing.entries)
    assert [entry.problem for entry in entries] == ["outside-root", "outside-root", None, None]
    assert entries[0].key == "./t.tar/../up.png" and "etc" not in entries[1].key
    assert listing.repeated == 1
    assert read_image(tmp_path, entries[2].sample(), 1000) == b"first"
    assert _reason(tmp_path, entries[3]) == (
        "unreadable", "it is a link or a device inside a tar file, which is not followed",
    )  # fmt: skip
    with pytest.raises(ImageError) as caught:
        read_rooted(tmp_path, "t.tar/../../secret.png")
    assert caught.value.reason == "missing"


def test_a_tar_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    write_tar(path, {"a.png": b"1"})
    assert read_rooted(tmp_path, "t.tar/a.png") == b"1"
    write_tar(path, {"b.png": b"22", "a.png": b"333"})
    assert read_rooted(tmp_path, "t.tar/a.png") == b"333"
    with pytest.raises(ImageError) as caught:
        read_rooted(tmp_path, "t.tar/a.png", limit=2)
    assert caught.value.reason == "too-large"


def test_sparse_and_malformed_headers_end_the_walk(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    for kind, words in ((b"S", "sparse"), (b"x", "malformed")):
        info = tarfile.TarInfo("a.png")
        info.type, info.size = kind, 10
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"99999 a=b\n".ljust(512, b"\0") + bytes(1024))
        with pytest.raises(TarDamage) as caught:
            _walk(path)
        assert words in caught.value.problem and caught.value.offset == 0


@pytest.mark.parametrize(
    "field", [b"-0000001000\0", b"\xff" * 10 + b"\xfe\0", b" 1_0        "], ids=("octal", "binary", "bar")
)
def test_negative_and_strange_sizes_end_the_walk(tmp_path: Path, field: bytes) -> None:
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "t.tar"
    path.write_bytes(header + bytes(2048))
    with pytest.raises(TarDamage, match="no number where one belongs"):
        _walk(path)


@pytest.mark.parametrize("size", [2**60 + 1, 2**63, 10**30, 10**5000], ids=("60 bits", "63 bits", "long", "too long"))
@pytest.mark.parametrize("pax", [False, True])
def test_impossible_sizes_end_the_walk(tmp_path: Path, size: int, pax: bool) -> None:
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    data = b""
    if pax:
        body = b"size=1" + b"0" * 5000 + b"\n" if size == 10**5000 else b"size=%d\n" % size  # str() has a limit
        length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)) + 1)
        record = str(length).encode() + b" " + body
        extended = tarfile.TarInfo("x")
        extended.type, extended.size = tarfile.XHDTYPE, len(record)
        data = extended.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
    else:
        header[124:136] = (1 << 95 | min(size, (1 << 88) - 1)).to_bytes(12, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "t.tar").write_bytes(data + header + bytes(2048))
    (entry,) = list_corpus(tmp_path, None).entries
    assert _reason(tmp_path, entry)[0] == "truncated"


def _parquet(path: Path, images: list[bytes | None], *, plain: bool = False, group: int = 2) -> None:
    if plain:
        column = pa.array(images, type=pa.binary())
    else:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        column = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)], type=kind)
    pq.write_table(pa.table({"caption": ["x"] * len(images), "image": column}), path, row_group_size=group)


@pytest.mark.parametrize("plain", [False, True])
def test_parquet_rows_are_images(tmp_path: Path, plain: bool) -> None:
    images: list[bytes | None] = [b"0", b"11", None, b"333", b"4444"]
    _parquet(tmp_path / "train-00000.parquet", images, plain=plain)
    entries = list(list_corpus(tmp_path, None).entries)
    assert entries == [Entry(f"train-00000.parquet/{row}", -1) for row in range(5)]
    for row in (4, 0, 3, 1):
        assert read_image(tmp_path, entries[row].sample(), 1000) == images[row]
    assert _reason(tmp_path, entries[2]) == ("missing", "row 2 of the parquet file holds no image bytes (null)")
    for bad in ("5", "-1", "01", "x", "1/2"):
        with pytest.raises(ImageError) as caught:
            read_rooted(tmp_path, f"train-00000.parquet/{bad}")
        assert caught.value.reason == "missing"
    assert is_rooted(tmp_path, "train-00000.parquet/4") and not is_rooted(tmp_path, "train-00000.parquet/5")


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "image": ["a.png"]}), path)
    with pytest.raises(CorpusError, match="no column of images; its columns: text, image"):
        list_corpus(path, None)
    _parquet(path, [b"1" * 5000, b"2" * 5000], group=1)
    data = bytearray(path.read_bytes())
    pages = pq.ParquetFile(path).metadata.row_group(0).column(1)
    start = pages.dictionary_page_offset or pages.data_page_offset
    path.write_bytes(data[:-40])
    (entry,) = list_corpus(tmp_path, None).entries
    assert _reason(tmp_path, entry)[0] == "truncated"
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    first, second = list_corpus(tmp_path, None).entries
    assert _reason(tmp_path, first)[0] == "truncated"
    assert read_image(tmp_path, second.sample(), 10**6) == b"2" * 5000


def test_conversations_may_name_images_inside_archives(tmp_path: Path) -> None:
    write_tar(tmp_path / "i" / "00000.tar", {"a.png": b"tar"})
    _parquet(tmp_path / "i" / "x.parquet", [b"row"])
    write_images(tmp_path / "i", "folder.tar/in.png")
    lines = ["00000.tar/a.png", "x.parquet/0", "folder.tar/in.png", "00000.tar/none.png", "./00000.tar//a.png"]
    (tmp_path / "c.jsonl").write_text("".join(f'{{"image": "{name}"}}\n' for name in lines))
    listing = list_corpus(tmp_path / "c.jsonl", tmp_path / "i")
    sizes = {entry.key: entry.size for entry in listing.entries}
    in_folder = (tmp_path / "i" / "folder.tar" / "in.png").stat().st_size
    assert sizes == {"00000.tar/a.png": 3, "x.parquet/0": -1, "folder.tar/in.png": in_folder, "00000.tar/none.png": -1}
    assert listing.repeated == 1
    assert read_rooted(tmp_path / "i", "x.parquet/0") == b"row"


def test_folders_that_link_to_each_other_are_listed_once(tmp_path: Path) -> None:
    names = [f"d{i}" for i in range(9)]
    write_images(tmp_path / "c", *(f"{name}/a.png" for name in names))
    write_images(tmp_path / "out", "x.png", "sub/y.png")
    for name in names:  # every folder links to every other: 9! paths
        for other in names:
            if other != name:
                (tmp_path / "c" / name / other).symlink_to(tmp_path / "c" / other)
    (tmp_path / "c" / "d3" / "one").symlink_to(tmp_path / "out")
    (tmp_path / "c" / "d5" / "two").symlink_to(tmp_path / "out")
    (tmp_path / "out" / "back").symlink_to(tmp_path)
    keys = [entry.key for entry in list_corpus(tmp_path / "c", None).entries]
    assert keys == sorted([f"{name}/a.png" for name in names] + ["d3/one/x.png", "d3/one/sub/y.png"])
