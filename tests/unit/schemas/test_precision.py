from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from olaschema.errors import ImageError
from olaschema.precision import decode, encode, require_storable

_FLOATS = st.floats(-65000, 65000, width=32)


@given(hnp.arrays(np.float32, (3, 5), elements=_FLOATS))
def test_float16_keeps_its_stated_error(features: np.ndarray) -> None:
    error = np.abs(decode(encode(features, "float16"), 5).astype(np.float64) - features)
    assert (error <= np.maximum(np.abs(features) * 2.0**-11, 2.0**-25)).all()


@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(width=32)))
def test_float32_is_exact(features: np.ndarray) -> None:
    assert decode(encode(features, "float32"), 5).tobytes() == features.tobytes()


@given(st.floats(width=32))
def test_what_is_storable_stays_finite(value: float) -> None:
    feature = np.array([1.0, value], dtype=np.float32)
    try:
        require_storable(feature, "float16", name="a.jpg")
    except ImageError as error:
        assert error.reason == ("overflow" if np.isfinite(value) else "not-finite")
        with np.errstate(over="ignore", invalid="ignore"):
            assert not np.isfinite(feature.astype(np.float16)).all()
    else:
        assert np.isfinite(encode(feature, "float16").values).all()


def test_overflow_names_image_and_remedy() -> None:
    with pytest.raises(ImageError, match=r"a\.jpg.*70000") as caught:
        require_storable(np.float32([70000.0]), "float16", name="a.jpg")
    assert "--precision float32" in caught.value.remedy
    require_storable(np.float32([70000.0]), "float32", name="a.jpg")
