"""`inspect --html` in a headless Chromium: opened, searched, pictures loaded, and inert whatever images are named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser_support import Browser, chromium
from pipeline_support import image_bytes, olapipe
from store_support import EXECUTION, record

from olapipe import webpage
from olaschema.manifest import ChannelStatistics, RowReceipt, SampleRow
from olaschema.precision import blank, encode
from olaschema.store import FeatureStore

EVIL = "<img src=x onerror=document.title='owned'>.jpg"
ENDING = "a</script><script>document.title='owned'</script>.jpg"  # a path with folders
KEYS = [EVIL, ENDING, "\"'><b>&amp;.jpg", *(f"cat {i:02d}.jpg" for i in range(37))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store of two teachers with 40 images, some failed, one shard of other values; and the image folder."""
    root = tmp_path_factory.mktemp("page")
    folder = root / "images"
    folder.mkdir()
    contents = {key: image_bytes(seed, (96, 72), "JPEG") for seed, key in enumerate(KEYS)}
    for key, data in contents.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
    store = FeatureStore.create(root / "<i>store", rows_per_shard=5)
    store.add_generation(SampleRow(row=0, key=key, uri=key, size=len(contents[key])) for key in KEYS)
    rng = np.random.default_rng(0)
    for name, grid, channels in (("depth", (12, 12), 96), ("gen", None, 256)):
        teacher = record("float16", teacher=name, grid=grid, channels=channels)
        store.put_teacher(teacher)
        for shard in range(8 if name == "depth" else 7):
            stored, rows = blank(5, teacher.fingerprint.shape, "float16"), [RowReceipt(status="absent")] * 5
            statistics = ChannelStatistics(channels)
            for place, sample in enumerate(store.shard_samples(shard)):
                if sample.row in (3, 22):
                    rows[place] = RowReceipt(status="failed", reason="truncated", detail="<b>cut</b> short")
                    continue
                feature = rng.normal(size=teacher.fingerprint.shape).astype(np.float32)
                if grid:
                    feature = np.cumsum(np.cumsum(feature, axis=0), axis=1) * 0.2 + np.float32(5 * (shard == 4))
                feature *= np.linspace(0.2, 3, channels, dtype=np.float32)
                stored[place] = encode(feature, "float16")
                digest = hashlib.sha256(contents[sample.key]).hexdigest()
                rows[place] = RowReceipt(status="ok", sha256=digest, width=96, height=72)
                statistics.update(feature[None])
            store.commit_shard(teacher, shard, stored, rows, statistics, EXECUTION)
    return root / "<i>store", folder


@pytest.fixture(scope="module")
def page(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("html") / "report.html"
    result = olapipe("inspect", made[0], "--html", out, "--images", made[1])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        started.open(page)
        yield started


def test_opened_with_all_pictures_and_no_word_on_the_console(browser: Browser) -> None:
    pictures = browser.run(
        "return Array.from(document.images, i => [i.src.slice(0, 11), i.complete, i.naturalWidth, i.naturalHeight])"
    )
    # eight figures: a photograph and two teachers each, but for one that is not extracted yet
    assert len(pictures) == 8 * 3 - 1
    assert all(
        start == "data:image/" and done and width > 10 and height > 10 for start, done, width, height in pictures
    )
    assert "truncated" in browser.run("return document.body.innerText")
    assert "shard 4 differs from the others" in browser.run("return document.body.innerText")
    assert browser.console() == []


def test_the_search_finds_keys_and_failures(browser: Browser) -> None:
    assert browser.run("return document.querySelectorAll('#results tr').length") == 10
    browser.type("#search", "CAT 1")
    found = browser.run("return Array.from(document.querySelectorAll('#results tr'), r => r.children[1].textContent)")
    assert found == [f"cat {i}.jpg" for i in range(10, 20)]
    assert browser.run("return document.getElementById('told').textContent") == "10 keys"
    browser.run("document.getElementById('search').value = ''; document.getElementById('only-failed').click()")
    rows = browser.run("return Array.from(document.querySelectorAll('#results tr'), r => r.innerText)")
    assert [int(re.split(r"\s", row)[0]) for row in rows] == [3, 22]
    browser.run("document.getElementById('only-failed').click()")
    browser.type("#search", "cat 36")
    assert "not extracted yet" in browser.run("return document.getElementById('results').innerText")


def test_names_of_images_stay_inert(browser: Browser) -> None:
    browser.run("document.getElementById('search').value = ''")
    browser.type("#search", "onerror")
    assert browser.run("return document.querySelector('#results td.key').textContent") == EVIL
    assert browser.run("return document.querySelectorAll('main img:not([src^=\"data:image/\"])').length") == 0
    assert browser.run("return document.querySelectorAll('main b img, main script, main i').length") == 0
    assert "owned" not in browser.run("return document.title")
    assert EVIL in browser.run("return document.querySelector('.gallery').innerText")
    browser.run("document.getElementById('search').value = ''")
    browser.type("#search", "</script>")
    assert browser.run("return document.querySelector('#results td.key').textContent") == ENDING
    assert browser.console() == []
    # and were something to slip through, the policy of the page stops it
    browser.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", EVIL)
    browser.run("const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\"; "
                "document.body.append(s)")  # fmt: skip
    assert "owned" not in browser.run("return document.title")
    assert any("Content Security Policy" in line for line in browser.console())


def test_the_page_names_nothing_outside_itself(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!data:)[^\"'>\s&]*(//|\.css|\.js)", text)
    assert "http://" not in text and "https://" not in text
    assert str(page.parent) not in text


def test_a_large_store_makes_a_bounded_page_that_says_so(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webpage, "MOST_KEYS", 10)
    text = webpage.render(FeatureStore.open(made[0]), None)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert [entry[0] for entry in data["keys"]] == [0, 3, 4, 8, 12, 16, 20, 22, 24, 28, 32, 36]
    assert "This page knows 12 keys" in text and "28 further images" in text
    assert "they were not given with --images" in text


@pytest.mark.parametrize(
    "arguments", [("KEY", "--html", "x.html"), ("--html", "x.html", "--json"), ("--html", "x.html", "--images", "no")]
)
def test_what_does_not_go_with_a_page(made: tuple[Path, Path], arguments: tuple[str, ...]) -> None:
    assert olapipe("inspect", made[0], *arguments).exit_code == 2


def test_a_page_that_cannot_be_written_is_an_error(made: tuple[Path, Path], tmp_path: Path) -> None:
    result = olapipe("inspect", made[0], "--html", tmp_path / "no" / "x.html")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
