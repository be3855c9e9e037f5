"""What `inspect` tells of a store and of one image, against numbers computed from the values themselves."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_support import image_bytes, olapipe
from rich.console import Console
from store_support import EXECUTION, fill_shard, make_store, record

from olapipe.picture import bars, pca_rgb
from olapipe.preview.rows import find_sample, read_feature
from olapipe.report import print_failures, size, summarise, visible
from olaschema.manifest import ChannelStatistics, Precision, RowReceipt, SampleRow
from olaschema.precision import blank, encode
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore


def _inspect(*arguments: object) -> dict[str, object]:
    result = olapipe("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_json_tells_coverage_bytes_and_channels(tmp_path: Path) -> None:
    root = tmp_path / "s"
    store, teacher, values = make_store(root, count=6, rows_per_shard=4)
    store.add_generation(SampleRow(row=0, key=f"new{i}.png", uri=f"new{i}.png", size=1) for i in range(3))
    store.put_teacher(teacher)
    found = _inspect(root)["teachers"]["depth"]  # type: ignore[index]
    assert list(found["arrays"]) == ["values"]
    assert found["arrays"]["values"]["shape"] == [12, 3, 3, 5]
    assert found["arrays"]["values"]["dtype"] == "float16"
    assert found["images"] == {"planned": 9, "ok": 6, "failed": 0, "waiting": 3}
    assert found["shards"] == {"planned": 3, "committed": 2}
    assert found["absent_rows"] == 2
    files = list((root / "depth/values/c").rglob("*"))
    stored = sum(path.stat().st_size for path in files if path.is_file())
    assert found["bytes"] == {"stored": stored, "float32": 6 * 45 * 4, "ratio": 6 * 45 * 4 / stored}
    # the float32 features the statistics were taken of differ from the stored ones by float16 rounding
    flat = values[:6].reshape(-1, 5).astype(np.float64)
    channels = found["channels"]
    assert channels["mean"] == pytest.approx(flat.mean(), abs=1e-3)
    assert channels["largest_std"] == pytest.approx(flat.std(axis=0).max(), rel=1e-3)
    assert channels["minimum"] == pytest.approx(flat.min(), rel=1e-3)
    assert channels["dead"] == 0
    assert found["fingerprint"]["digest"] == teacher.fingerprint.digest()
    line = next(line for line in olapipe("inspect", root).stdout.splitlines() if "norm of a token, median" in line)
    shown = line.partition("≈")[2].strip(" │")
    assert len(shown.replace(".", "")) <= 2, "a bin of the histogram is 9 % wide"
    assert float(shown) == pytest.approx(np.median(np.linalg.norm(flat, axis=1)), rel=0.1)


@pytest.mark.parametrize(("precision", "dtype", "width"), [("int8", "int8", 130), ("int4", "uint8", 65)])
def test_all_arrays_of_integers_are_described(tmp_path: Path, precision: Precision, dtype: str, width: int) -> None:
    root = tmp_path / "s"
    _, _, features = make_store(root, count=6, rows_per_shard=4, precision=precision, channels=130)
    found = _inspect(root)["teachers"]["depth"]  # type: ignore[index]
    assert found["precision"] == precision
    stored = {
        name: sum(path.stat().st_size for path in (root / "depth" / name / "c").rglob("*") if path.is_file())
        for name in ("values", "scale", "offset")
    }
    assert found["arrays"] == {
        "values": {
            "path": "depth/values", "shape": [8, 3, 3, width], "dtype": dtype, "shard": [4, 3, 3, width],
            "bytes": stored["values"],
        },
        "scale": {
            "path": "depth/scale", "shape": [8, 3, 3, 3], "dtype": "float16", "shard": [4, 3, 3, 3],
            "bytes": stored["scale"],
        },
        "offset": {
            "path": "depth/offset", "shape": [8, 130], "dtype": "float16", "shard": [4, 130],
            "bytes": stored["offset"],
        },
    }  # fmt: skip
    total = sum(stored.values())
    assert found["bytes"] == {"stored": total, "float32": 6 * 9 * 130 * 4, "ratio": 6 * 9 * 130 * 4 / total}
    shown = olapipe("inspect", root).stdout
    assert f"{dtype} + float16" in shown
    assert size(stored["scale"]) in shown and size(stored["offset"]) in shown
    image = _inspect(root, "0005.jpg")["teachers"]["depth"]["features"]  # type: ignore[index]
    assert image["mean"] == pytest.approx(float(features[5].astype(np.float64).mean()))
    assert image["minimum"] == pytest.approx(float(features[5].min()))


def test_dead_channels_and_failures_are_counted_by_reason(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=4)
    store.add_generation(SampleRow(row=0, key=f"{i}.png", uri=f"{i}.png", size=1) for i in range(4))
    teacher = record("float32")
    store.put_teacher(teacher)
    features = np.random.default_rng(0).normal(size=(4, 3, 3, 5)).astype(np.float32)
    features[..., 2] = 0.25
    fill_shard(store, teacher, 0, features, failed=(1, 3))
    found = _inspect(tmp_path / "s")["teachers"]["depth"]  # type: ignore[index]
    assert found["channels"]["dead"] == 1
    assert found["failed_by_reason"] == {"truncated": 2}
    assert [(f["row"], f["key"], f["detail"]) for f in found["failures"]] == [
        (1, "1.png", "cut short"),
        (3, "3.png", "cut short"),
    ]
    shown = olapipe("inspect", tmp_path / "s").stdout
    assert "truncated: 2" in shown
    assert "1.png: cut short" in shown


def test_a_store_without_features_yet_is_shown(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=4)
    assert "no teacher yet" in olapipe("inspect", tmp_path / "s").stdout
    store.add_generation([SampleRow(row=0, key="a", uri="a", size=1)])
    store.put_teacher(record())
    result = olapipe("inspect", tmp_path / "s")
    assert result.exit_code == 0
    assert "not extracted yet" in result.stdout


def test_one_image_by_its_key(tmp_path: Path) -> None:
    store, _, values = make_store(tmp_path / "s", count=6)
    sample = list(store.samples())[5]
    found = _inspect(tmp_path / "s", f"./{sample.key}")
    assert found["sample"]["row"] == 5  # type: ignore[index]
    features = found["teachers"]["depth"]["features"]  # type: ignore[index]
    assert features["mean"] == pytest.approx(float(values[5].astype(np.float64).mean()))
    assert features["maximum"] == float(values[5].max())
    assert sample.key in olapipe("inspect", tmp_path / "s", sample.key).stdout


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["none"], "no such feature store", 1),
        (["s", "unknown.png"], "has no image unknown.png", 1),
        (["s", "unknown.png", "--picture", "p.png"], "--picture and --images go together", 2),
        (["s", "--picture", "p.png", "--images", "."], "needs the KEY", 2),
    ],
)
def test_what_cannot_be_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str, code: int
) -> None:
    make_store(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    result = olapipe("inspect", *arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output


def _pictured(root: Path, precision: Precision = "float32") -> Path:
    """A store of one image of 40 × 20 with features of two teachers, one of them a vector."""
    data = image_bytes(0, (40, 20))
    (root / "i").mkdir()
    (root / "i" / "a.png").write_bytes(data)
    store = FeatureStore.create(root / "s", rows_per_shard=2)
    store.add_generation([SampleRow(row=0, key="a.png", uri="a.png", size=len(data))])
    for name, shape in (("depth", (3, 3)), ("gen", None)):
        teacher = record(precision, teacher=name, grid=shape)
        store.put_teacher(teacher)
        stored = blank(2, teacher.fingerprint.shape, precision, centred=teacher.centred)
        feature = np.random.default_rng(1).normal(size=teacher.fingerprint.shape).astype(np.float32)
        stored[0] = encode(feature, precision, centred=teacher.centred)
        row = RowReceipt(status="ok", sha256=hashlib.sha256(data).hexdigest(), width=40, height=20)
        statistics = ChannelStatistics(5)
        statistics.update(feature[None])
        store.commit_shard(teacher, 0, stored, [row, RowReceipt(status="absent")], statistics, EXECUTION)
    return root / "s"


def test_the_picture_shows_image_map_and_bars_side_by_side(tmp_path: Path) -> None:
    store = _pictured(tmp_path)
    out = tmp_path / "p.png"
    result = olapipe("inspect", store, "a.png", "--picture", out, "--images", tmp_path / "i")
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        shown = np.asarray(picture.convert("RGB"))
    # a squashed map takes the image's own shape (672 × 336), the vector a square; gaps of 8, a label of 22
    assert shown.shape == (336 + 22 + 16, 672 * 2 + 336 + 4 * 8, 3)
    with Image.open(tmp_path / "i" / "a.png") as opened:
        image = np.asarray(opened.resize((672, 336)).convert("RGB"))
    np.testing.assert_array_equal(shown[30 : 30 + 336, 8:680], image)
    cells = shown[30:366, 688 : 688 + 672].reshape(3, 112, 3, 224, 3)
    assert (cells == cells[:, :1, :, :1]).all()  # nine flat cells
    assert len(np.unique(cells[:, 0, :, 0].reshape(9, 3), axis=0)) > 3


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_picture_of_integers_is_that_of_the_features(tmp_path: Path, precision: Precision) -> None:
    shown = {}
    for tier in ("float32", precision):
        (tmp_path / tier).mkdir()
        store, out = _pictured(tmp_path / tier, tier), tmp_path / f"{tier}.png"
        result = olapipe("inspect", store, "a.png", "--picture", out, "--images", tmp_path / tier / "i")
        assert result.exit_code == 0, result.output
        with Image.open(out) as picture:
            shown[tier] = np.asarray(picture.convert("RGB")).astype(float)
        assert read_feature(
            FeatureStore.open(store),
            FeatureReader(FeatureStore.open(store), "depth"),
            find_sample(FeatureStore.open(store), "a.png"),
        ).shape == (3, 3, 5)
    assert shown[precision].shape == shown["float32"].shape
    assert np.corrcoef(shown[precision].ravel(), shown["float32"].ravel())[0, 1] > 0.97


def test_another_image_of_that_name_is_refused(tmp_path: Path) -> None:
    store = _pictured(tmp_path)
    original = (tmp_path / "i" / "a.png").read_bytes()
    (tmp_path / "i" / "a.png").write_bytes(original[:-1] + b"\0")
    result = olapipe("inspect", store, "a.png", "--picture", tmp_path / "p.png", "--images", tmp_path / "i")
    assert result.exit_code == 1
    assert "is not the image that was extracted" in result.stderr
    (tmp_path / "i" / "a.png").write_bytes(original)
    result = olapipe("inspect", store, "a.png", "--picture", tmp_path / "no" / "p.png", "--images", tmp_path / "i")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_colours_are_the_principal_components() -> None:
    rng = np.random.default_rng(3)
    # three orthogonal directions of known, decreasing strength; positive largest loadings
    axes = np.linalg.qr(rng.normal(size=(16, 3)))[0].T
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]
    noise = rng.normal(size=(144, 3))
    scores = np.linalg.qr(noise - noise.mean(axis=0))[0] * [9.0, 5.0, 2.0]
    colours = pca_rgb((scores @ axes + rng.normal(size=16)).reshape(12, 12, 16)).reshape(-1, 3).astype(float)
    for component in range(3):
        inside = (colours[:, component] > 0) & (colours[:, component] < 255)
        assert inside.sum() > 120
        correlation = np.corrcoef(colours[inside, component], scores[inside, component])[0, 1]
        assert correlation > 0.999


def test_colours_of_flat_and_narrow_maps_are_grey_where_nothing_varies() -> None:
    assert (pca_rgb(np.ones((4, 4, 8))) == 127).all()
    one = pca_rgb(np.arange(16.0).reshape(4, 4, 1))
    assert (one[..., 1:] == 127).all()
    assert (np.diff(one[..., 0].ravel().astype(int)) >= 0).all()


def test_bars_go_up_and_down_with_the_values() -> None:
    drawn = bars(np.array([1.0, -1.0, 0.25, 0.0]), 4, 100)
    filled = (drawn != 255).any(axis=-1)
    assert filled[:50].sum(axis=0).tolist() == [49, 0, 12, 0]
    assert filled[50:].sum(axis=0).tolist() == [0, 49, 0, 0]
    assert bars(np.arange(1000.0), 10, 20).shape == (20, 10, 3)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 [red]x[/red]", "plain é 漢 [red]x[/red]"),
        ("\x1b[31mred\n", "\\x1b[31mred\\x0a"),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),
        ("gpj.\u202efdp", "gpj.\\u202efdp"),
    ],
)
def test_text_is_made_safe_for_a_terminal(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode()


def test_failures_are_named_a_few_per_reason_and_markup_is_inert(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=8)
    names = ["[red]x[/red].jpg", *(f"{i}.jpg" for i in range(6))]
    store.add_generation(SampleRow(row=0, key=name, uri=name, size=1) for name in names)
    teacher = record("float32")
    store.put_teacher(teacher)
    fill_shard(store, teacher, 0, np.zeros((7, 3, 3, 5), np.float32), failed=tuple(range(7)))
    out = io.StringIO()
    print_failures(Console(file=out, width=200), store, [summarise(store, "depth")])
    text = out.getvalue()
    assert "truncated: 7" in text
    assert "[red]x[/red].jpg: cut short" in text
    assert "3.jpg" in text and "4.jpg" not in text
    assert "and 2 more" in text
    assert "inspect" in text and "--json" in text


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.00 TiB")],
)
def test_sizes_in_words(count: int, shown: str) -> None:
    assert size(count) == shown
