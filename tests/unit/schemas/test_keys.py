from __future__ import annotations

import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olaschema.errors import ImageError
from olaschema.keys import normalise_key


@pytest.mark.parametrize(
    ("text", "key"), [("a.jpg", "a.jpg"), ("./a//b.jpg", "a/b.jpg"), ("a/../b.jpg", "b.jpg"), ("Ä/ß.png", "Ä/ß.png")]
)
def test_equal_paths_have_one_key(text: str, key: str) -> None:
    assert normalise_key(text) == key


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "https://example.org/a.jpg", "s3://b/a.jpg", "pipe:cat x", "."]
)
def test_paths_that_leave_the_root_are_refused(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        normalise_key(text)
    assert caught.value.reason == "outside-root"


@pytest.mark.parametrize(
    "text", ["", "  ", "a\0b.jpg", "\ud800.jpg", b"caf\xe9.jpg".decode("utf-8", "surrogateescape")]
)
def test_names_that_are_no_names(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        normalise_key(text)
    assert caught.value.reason == "bad-name"
    caught.value.problem.encode()  # printable on any terminal


@given(st.text(alphabet="ab./", max_size=12))
def test_a_key_is_a_fixed_point_and_agrees_with_posixpath(text: str) -> None:
    try:
        key = normalise_key(text)
    except ImageError:
        return
    assert normalise_key(key) == key
    assert key == posixpath.normpath(text)
