"""What a corpus lists, in which order and under which names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_support import image_bytes, write_images
from store_support import make_store

from olapipe.corpus import Entry, Listing, compare, list_corpus, read_image
from olapipe.planning import gather
from olaschema.errors import CorpusError, ImageError, StoreError
from olaschema.manifest import SampleRow
from olaschema.store import FeatureStore


def _keys(listing: Listing) -> list[str]:
    return [entry.key for entry in listing.entries]


def _json(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_folder_is_listed_by_bytes_of_the_path_whatever_the_extension_case(tmp_path: Path) -> None:
    write_images(tmp_path, "b/z.png", "a.JPG", "b.png", "B.jpeg", "b/a.png", "é.png", "b-1.png")
    (tmp_path / "notes.txt").write_text("no image")
    # "-" (2d) < "." (2e) < "/" (2f), capitals before small letters, é (c3 a9) last
    assert _keys(list_corpus(tmp_path, None)) == [
        "B.jpeg", "a.JPG", "b-1.png", "b.png", "b/a.png", "b/z.png", "é.png",
    ]  # fmt: skip
    sizes = {entry.key: entry.size for entry in list_corpus(tmp_path, None).entries}
    assert sizes["b.png"] == (tmp_path / "b.png").stat().st_size


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_images(tmp_path / "other", "x.png")
    write_images(tmp_path / "corpus", "sub/y.png")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "corpus" / "sub" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "other" / "self").symlink_to(tmp_path / "other")
    assert _keys(list_corpus(tmp_path / "corpus", None)) == ["link/x.png", "sub/y.png"]


def test_folders_named_like_images_broken_links_and_pipes(tmp_path: Path) -> None:
    write_images(tmp_path, "folder.jpg/in.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    listed = {entry.key: entry.size for entry in list_corpus(tmp_path, None).entries}
    assert listed["broken.png"] == -1
    assert listed["pipe.png"] == -1
    assert set(listed) == {"folder.jpg/in.png", "broken.png", "pipe.png"}


def test_a_name_that_is_not_utf8_is_planned_under_an_escaped_one(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", b"caf\\xe9.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    entries = list(list_corpus(tmp_path, None).entries)
    # sorted by bytes: the literal backslash (5c) comes before e9
    assert entries == [Entry("caf\\xe9.png", 1, None), Entry("./caf\\xe9.png", -1, "bad-name")]


def test_escaping_keeps_names_apart(tmp_path: Path) -> None:
    names = ["\udce9\\xe9.png", "\\xe9\udce9.png"]
    (tmp_path / "c.json").write_text(json.dumps([{"image": name} for name in names]))
    keys = _keys(list_corpus(tmp_path / "c.json", tmp_path))
    assert keys == ["./\\xe9\\\\xe9.png", "./\\\\xe9\\xe9.png"]


def test_conversations_list_each_image_once_in_order_of_first_use(tmp_path: Path) -> None:
    write_images(tmp_path / "i", "a.png", "b/c.png")
    corpus = _json(
        tmp_path / "c.json",
        [
            {"image": "b/c.png", "conversations": []},
            {"conversations": [{"from": "human", "value": "text only"}]},
            {"image": ["a.png", "./b//c.png"]},
            {"image": "a.png"},
            {"image": []},
            {"image": None},
        ],
    )
    listing = list_corpus(corpus, tmp_path / "i")
    assert _keys(listing) == ["b/c.png", "a.png"]
    assert (listing.repeated, listing.text_only) == (2, 3)
    assert listing.root == tmp_path / "i"


def test_jsonl_lists_the_same_as_json(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    samples = [{"image": "b.png"}, {"id": 1}, {"image": "a.png"}]
    lines = tmp_path / "c.jsonl"
    lines.write_text("\ufeff" + "\n\n".join(map(json.dumps, samples)) + "\n", encoding="utf-8")
    one, other = list_corpus(lines, tmp_path), list_corpus(_json(tmp_path / "c.json", samples), tmp_path)
    assert list(one.entries) == list(other.entries)
    assert (one.repeated, one.text_only) == (other.repeated, other.text_only) == (0, 1)


def test_paths_outside_the_root_are_planned_without_leaking_where_they_point(tmp_path: Path) -> None:
    names = ["../up.png", "/etc/secret.png", "https://host/u.png?Signature=SECRET", "a/../../up.png", "a\0.png", ""]
    listing = list_corpus(_json(tmp_path / "c.json", [{"image": name} for name in names]), tmp_path)
    assert [entry.problem for entry in listing.entries] == ["outside-root"] * 4 + ["bad-name"] * 2
    assert all(entry.size == -1 for entry in listing.entries)
    keys = _keys(listing)
    assert len(set(keys)) == 6
    assert keys[0] == "../up.png"
    assert "secret.png" in keys[1] and "etc" not in keys[1]
    assert "u.png" in keys[2] and "SECRET" not in keys[2] and "host" not in keys[2]
    assert keys[4] == "./a\\x00.png"


def test_lone_surrogates_of_json_are_bad_names(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(r'[{"image": "\ud800.png"}, {"image": "\udce9.png"}]')
    listing = list_corpus(tmp_path / "c.json", tmp_path)
    assert list(listing.entries) == [Entry("./\\ud800.png", -1, "bad-name"), Entry("./\\xe9.png", -1, "bad-name")]


@given(st.lists(st.text(alphabet="ab./\\x0é9\udce9\ud800\0 ", max_size=8), min_size=1, max_size=12, unique=True))
def test_every_key_can_be_stored_and_no_two_bad_names_share_one(names: list[str]) -> None:
    root = Path("/nonexistent")
    from olapipe.corpora.entry import make_key

    found = {name: make_key(name) for name in names}
    bad = [key for key, problem in found.values() if problem == "bad-name"]
    good = {key for key, problem in found.values() if problem is None}
    assert len(bad) == len(set(bad))
    assert not good & {key for key, problem in found.values() if problem}
    for key, _ in found.values():
        key.encode()
        assert str(root) not in key


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("{", "c.json", "is not JSON"),
        ('{"a": 1}', "c.json", "not a list"),
        ('{"image": "a.png"}\n{"image": ', "c.jsonl", "line 2 is not JSON"),
        ('[{"id": 1}]', "c.json", "none of its 1 entries has an image"),
        ('[{"image": {"bytes": 1}}]', "c.json", "entry 0: `image`"),
        ('[{"image": ["a.png", 3]}]', "c.json", "entry 0: `image`"),
        ('["a.png"]', "c.json", "entry 0 is a str"),
        ("a.png", "c.csv", "neither a folder nor"),
    ],
)
def test_unusable_conversations_say_what_and_where(tmp_path: Path, content: str, name: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CorpusError, match=words) as caught:
        list_corpus(path, tmp_path)
    assert name in caught.value.problem
    assert caught.value.remedy


def test_bytes_that_are_not_utf8_are_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorpusError, match="cannot be read"):
        list_corpus(tmp_path / "c.json", tmp_path)


def test_corpora_that_are_not_there(tmp_path: Path) -> None:
    corpus = _json(tmp_path / "c.json", [{"image": "a.png"}])
    (tmp_path / "empty").mkdir()
    for path, images, words in (
        (tmp_path / "none", None, "no such file or folder"),
        (tmp_path / "empty", None, "no image in this folder"),
        (tmp_path / "empty", tmp_path, "holds the images itself"),
        (corpus, None, "folder of its images is not given"),
        (corpus, tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(CorpusError, match=words) as caught:
            list_corpus(path, images)
        assert caught.value.remedy


def _store_of(root: Path, sizes: dict[str, int]) -> FeatureStore:
    store = FeatureStore.create(root, rows_per_shard=4)
    store.add_generation(SampleRow(row=0, key=key, uri=key, size=size) for key, size in sizes.items())
    return store


def test_growth_is_what_the_store_does_not_know(tmp_path: Path) -> None:
    store = _store_of(tmp_path / "s", {"a": 1, "gone": 2, "missing then": -1, "missing now": 5})
    entries = [Entry("new", 9), Entry("a", 1), Entry("missing then", 7), Entry("missing now", -1)]
    growth = compare(gather(tmp_path, entries), store)
    assert (list(growth.new), growth.known, growth.gone) == ([Entry("new", 9)], 3, 1)


def test_a_file_of_another_size_than_planned_is_refused_by_name(tmp_path: Path) -> None:
    store, _, _ = make_store(tmp_path / "s", count=3)
    planned = {sample.key: sample.size for sample in store.samples()}
    key = sorted(planned)[1]
    entries = [Entry(name, size + (name == key)) for name, size in planned.items()]
    (tmp_path / key).write_bytes(b"another image")
    with pytest.raises(StoreError, match=f"{key} had {planned[key]} bytes") as caught:
        compare(gather(tmp_path, entries), store)
    assert "another --out" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [("gone.png", 4, "missing"), ("folder.png", -1, "unreadable"), ("pipe.png", -1, "unreadable"),
     ("file.png/x.png", -1, "missing"), ("file.png", 10_000, "changed"), ("loop.png", -1, "unreadable"),
     ("big.png", 70 << 20, "too-large")],
)  # fmt: skip
def test_bytes_that_cannot_be_read_have_a_reason(tmp_path: Path, name: str, size: int, reason: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").write_bytes(image_bytes(0))
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "big.png").open("wb") as file:
        file.truncate(70 << 20)
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path, SampleRow(row=0, key=name, uri=name, size=size), max_pixels=1000)
    assert caught.value.reason == reason
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_was_missing_when_planned_may_have_come(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    assert read_image(tmp_path, SampleRow(row=0, key="a.png", uri="a.png", size=-1), 1000) == b"12345"


def test_nesting_without_end_a_mark_and_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(CorpusError, match="line 1 is not JSON"):
        list_corpus(tmp_path / "deep.jsonl", tmp_path)
    (tmp_path / "mark.json").write_text('[{"image": "a.png"}]', encoding="utf-8-sig")
    assert [entry.key for entry in list_corpus(tmp_path / "mark.json", tmp_path).entries] == ["a.png"]
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(CorpusError, match="is a pipe or a device"):
        list_corpus(tmp_path / "pipe.json", tmp_path)


def test_a_link_to_itself_is_one_failed_image(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "selfdir").symlink_to("selfdir")
    assert [(e.key, e.size >= 0) for e in list_corpus(tmp_path, None).entries] == [("a.png", True), ("self.png", False)]
