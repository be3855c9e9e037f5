from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_support import fingerprint

from olaschema.errors import FingerprintError
from olaschema.manifest import ChannelStatistics, RowReceipt, View


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(2, 30), st.just(3)), elements=st.floats(-1e3, 1e3, width=32)),
    st.integers(1, 5),
)
def test_statistics_of_batches_are_those_of_the_whole(features: np.ndarray, batch: int) -> None:
    merged = ChannelStatistics(3)
    for start in range(0, len(features), batch):
        merged.update(features[start : start + batch])
    exact = features.astype(np.float64)
    assert merged.count == len(features)
    np.testing.assert_allclose(merged.mean, exact.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.variance, exact.var(axis=0), rtol=1e-7, atol=1e-7)
    assert (merged.minimum == exact.min(axis=0)).all()
    assert (merged.maximum == exact.max(axis=0)).all()


def test_statistics_survive_json_bit_for_bit() -> None:
    stats = ChannelStatistics(4)
    stats.update(np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32))
    again = ChannelStatistics.from_json(stats.to_json(), 4)
    for name in ("mean", "m2", "minimum", "maximum"):
        assert getattr(again, name).tobytes() == getattr(stats, name).tobytes()
    with pytest.raises(ValueError, match="expected"):
        ChannelStatistics.from_json(stats.to_json(), 5)


def test_a_fingerprint_names_what_differs() -> None:
    ours, theirs = fingerprint(), fingerprint(weights="other", view="pad")
    assert ours.digest() != theirs.digest()
    assert ours.digest() == fingerprint().digest()
    with pytest.raises(FingerprintError) as caught:
        ours.require_equal(theirs, mine="in the store", theirs="asked for", remedy="Use another --out.")
    assert "weights: 'w' (in the store) against 'other' (asked for)" in caught.value.problem
    assert "preprocessing.view.kind: 'squash' (in the store) against 'pad' (asked for)" in caught.value.problem


@pytest.mark.parametrize(
    ("student", "teacher", "spatial", "accepted"),
    [
        ("squash", "squash", True, True),
        ("squash", "crop", True, False),
        ("crop", "squash", True, False),
        ("crop", "squash", False, False),  # the teacher describes what the student cannot see
        ("squash", "crop", False, True),
        ("pad", "crop", False, True),
        ("pad", "squash", True, False),
        ("crop", "crop", True, True),
    ],
)
def test_views(student: str, teacher: str, spatial: bool, accepted: bool) -> None:
    a, b = View.model_validate({"kind": student}), View.model_validate({"kind": teacher})
    assert a.accepts(b, spatial=spatial) is accepted


def test_a_tighter_crop_does_not_see_a_wider_one() -> None:
    wide, tight = View(kind="crop"), View(kind="crop", fraction=0.875)
    assert wide.accepts(tight, spatial=False)
    assert not tight.accepts(wide, spatial=False)
    assert not wide.accepts(tight, spatial=True)


def test_chosen_fields_of_a_row_can_be_dumped() -> None:
    row = RowReceipt(status="ok", sha256="0" * 64, width=3, height=2)
    assert row.model_dump(include={"width", "height"}) == {"width": 3, "height": 2}
