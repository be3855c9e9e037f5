"""The command with an integer precision: a store that plain zarr and the docs decode, within the bound of the tier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from pipeline_support import DEPTH, depth_arguments, digests, olapipe, ray_session, write_images
from store_support import DOCS, decoding

from olapipe.load import teacher_record
from olapipe.teachers import registry
from olapipe.teachers.base import TeacherSettings
from olaschema.images import decode_image
from olaschema.manifest import Precision
from olaschema.store import FeatureStore

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]


@pytest.mark.parametrize(("precision", "parts"), [("int8", 254), ("int4", 14)])
def test_a_corpus_is_extracted_grown_and_read(tmp_path: Path, precision: Precision, parts: int) -> None:
    folder, out = tmp_path / "c", tmp_path / "s"
    write_images(folder, "a.png", "b.png", "c.png", size=(60, 45))
    arguments = depth_arguments(folder, out, "--shard-size", 2, "--batch-size", 2, "--workers", 1)
    arguments += ["--precision", precision]
    result = olapipe(*arguments)
    assert result.exit_code == 0, result.output
    before = digests(out)
    write_images(folder, "a.png", "b.png", "c.png", "d.png", size=(60, 45))
    result = olapipe(*arguments)
    assert result.exit_code == 0, result.output
    after = digests(out)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"depth/{array}/zarr.json" for array in ("values", "scale", "offset")} | {"manifest.json"}

    teacher = registry.load("depth", TeacherSettings(checkpoint=str(DEPTH)))
    arrays = {name: array[:] for name, array in zarr.open_group(out, mode="r")["depth"].arrays()}
    decoded = decoding(DOCS, precision)(channels=48, **arrays)
    assert decoded.shape == (6, 24, 24, 48)
    for row, name in ((0, "a.png"), (2, "c.png"), (4, "d.png")):
        pixels = teacher.preprocessor(decode_image((folder / name).read_bytes(), name=name))
        exact = teacher.encode(torch.from_numpy(pixels)[None])[0].numpy()
        centred = exact - exact.astype(np.float64).mean(axis=(0, 1))
        bound = np.abs(centred).max(axis=-1, keepdims=True) / parts * (1 + 2.0**-9) + 2.0**-25
        # 1e-4: the teacher saw other batches then
        assert (np.abs(decoded[row] - exact) <= bound + 1e-4).all()
    assert np.isnan(decoded[[3, 5]]).all()

    found = json.loads(olapipe("inspect", out, "--json").stdout)["teachers"]["depth"]
    assert found["images"] == {"planned": 4, "ok": 4, "failed": 0, "waiting": 0}
    assert found["bytes"]["stored"] == sum(array["bytes"] for array in found["arrays"].values())
    assert FeatureStore.open(out).teacher("depth").zstd_level == 1
    assert found["bytes"]["ratio"] > {"int8": 3.5, "int4": 6.0}[precision]
    assert [array["path"] for array in found["arrays"].values()] == ["depth/values", "depth/scale", "depth/offset"]
    refused = olapipe(*depth_arguments(folder, out))
    assert refused.exit_code == 1
    assert f"stored as {precision}, float16 was asked for" in refused.stderr


def test_a_store_that_was_begun_without_offsets_goes_on_without(tmp_path: Path) -> None:
    folder, out = tmp_path / "c", tmp_path / "s"
    write_images(folder, "a.png", size=(60, 45))
    teacher = registry.load("depth", TeacherSettings(checkpoint=str(DEPTH)))
    begun = FeatureStore.create(out, rows_per_shard=2)
    begun.put_teacher(teacher_record(teacher, "int8").model_copy(update={"centred": False}))
    before = (out / "depth/zarr.json").read_bytes()
    result = olapipe(*depth_arguments(folder, out, "--precision", "int8", "--workers", 1))
    assert result.exit_code == 0, result.output
    assert (out / "depth/zarr.json").read_bytes() == before
    arrays = {name: array[:] for name, array in zarr.open_group(out, mode="r")["depth"].arrays()}
    assert set(arrays) == {"values", "scale"}
    pixels = teacher.preprocessor(decode_image((folder / "a.png").read_bytes(), name="a.png"))
    exact = teacher.encode(torch.from_numpy(pixels)[None])[0].numpy()
    bound = np.abs(exact).max(axis=-1, keepdims=True) / 254 * (1 + 2.0**-9) + 2.0**-25
    assert (np.abs(decoding(DOCS, "int8")(channels=48, **arrays)[0] - exact) <= bound + 1e-4).all()
    assert olapipe("verify", out).exit_code == 0
