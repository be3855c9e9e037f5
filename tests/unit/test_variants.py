"""Target variants: other grids and unit tokens, against arithmetic written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_support import FakeTeacher

from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olapipe.teachers.variants import Variant, VariedTeacher, vary
from olaschema.errors import TeacherError

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str, **options: Any) -> Teacher:
    return registry.load(name, TeacherSettings(str(GOLDEN / name), options=options))


def pixels(teacher: Teacher) -> torch.Tensor:
    return torch.randn(2, 3, *teacher.preprocessor.output_size, generator=torch.Generator().manual_seed(3))


def test_no_variant_is_the_teacher_itself() -> None:
    teacher = FakeTeacher()
    assert vary(teacher, Variant()) is teacher
    assert vary(teacher, Variant((2, 2), "area")) is teacher
    assert not isinstance(golden("depth"), VariedTeacher)
    assert golden("depth", grid="24", grid_resize="area").fingerprint == golden("depth").fingerprint


def area(map_hwc: np.ndarray, cells: int) -> np.ndarray:
    side = len(map_hwc) // cells
    return map_hwc.reshape(cells, side, cells, side, -1).mean((1, 3))


def bilinear(map_hwc: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of target cell i lies at (i + ½) · old/new − ½ of the source."""

    def matrix(new: int, old: int) -> np.ndarray:
        position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(position.astype(int), old - 2)
        weights = np.zeros((new, old))
        weights[np.arange(new), low], weights[np.arange(new), low + 1] = 1 - (position - low), position - low
        return weights

    return np.einsum("ih,jw,hwc->ijc", matrix(height, len(map_hwc)), matrix(width, map_hwc.shape[1]), map_hwc)


def test_grid_of_a_real_teacher() -> None:
    plain = golden("depth")
    given = pixels(plain)
    before = plain.encode(given).double().numpy()
    pooled = golden("depth", grid=12, grid_resize="area")
    np.testing.assert_allclose(pooled.encode(given)[1], area(before[1], 12), rtol=1e-4, atol=1e-5)
    larger = golden("depth", grid="30x27", grid_resize="bilinear")
    np.testing.assert_allclose(larger.encode(given)[0], bilinear(before[0], 30, 27), rtol=1e-4, atol=1e-5)
    assert pooled.fingerprint.grid == (12, 12)
    assert larger.fingerprint.shape == (30, 27, plain.fingerprint.channels)
    assert larger.fingerprint.options["grid_resize"] == "bilinear"
    # the same cells made in another way mean something else
    other = golden("depth", grid=12, grid_resize="bilinear")
    assert other.fingerprint != pooled.fingerprint
    assert pooled.fingerprint.weights == plain.fingerprint.weights
    assert (pooled.licence, pooled.source, pooled.name) == (plain.licence, plain.source, "depth")


def test_unit_tokens_are_made_last() -> None:
    plain = golden("depth")
    given = pixels(plain)
    varied = golden("depth", grid=6, grid_resize="area", l2_norm=True)
    want = area(plain.encode(given)[0].double().numpy(), 6)
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    actual = varied.encode(given)
    np.testing.assert_allclose(actual[0], want, rtol=1e-4, atol=1e-6)
    assert actual.dtype == torch.float32
    assert varied.fingerprint.options["l2_norm"] is True
    assert torch.equal(varied.encode_images(given, ["ab" * 32] * 2), actual)


def test_vectors_can_be_unit_but_have_no_grid() -> None:
    plain, varied = golden("gen"), golden("gen", l2_norm="true")
    given = pixels(plain)
    want = plain.encode(given)
    torch.testing.assert_close(varied.encode(given), want / want.norm(dim=-1, keepdim=True))
    assert varied.fingerprint.grid is None
    with pytest.raises(TeacherError, match="one vector per image"):
        golden("gen", grid=4, grid_resize="area")


@pytest.mark.parametrize("options", [{"grid": "12"}, {"grid_resize": "area"}, {"grid_resize": "none", "grid": "3x4"}])
def test_a_grid_needs_a_way_of_resizing(options: dict[str, Any]) -> None:
    with pytest.raises(TeacherError, match=r"(?s)grid=.* with grid_resize=.*needs grid_resize=area"):
        golden("depth", **options)


def test_digests_reach_a_teacher_that_draws() -> None:
    class Drawing(FakeTeacher):
        def encode_images(self, pixels_bchw: torch.Tensor, digests: Any) -> torch.Tensor:
            return self.encode(pixels_bchw) + torch.tensor([int(d, 16) for d in digests]).reshape(-1, 1, 1, 1)

    teacher = vary(Drawing(), Variant((1, 1), "area"))
    drawn = teacher.encode_images(torch.zeros(2, 3, 2, 2), ["1", "f"])
    assert drawn.tolist() == [[[[1.0] * 4]], [[[15.0] * 4]]]
