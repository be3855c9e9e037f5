"""Decoding: every mode becomes the RGB a viewer would show, every kind of damage one named reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from olaschema.errors import ImageError
from olaschema.images import decode_image


def _bytes(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, fmt, **options)
    return sink.getvalue()


def _reason(data: bytes, **options: object) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, name="x.jpg", **options)  # type: ignore[arg-type]
    assert "x.jpg" in caught.value.problem
    return caught.value.reason


def test_rgb_png_is_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode_image(_bytes(Image.fromarray(pixels)), name="a").rgb), pixels)


def test_cmyk_is_inverted_ink() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    red, green, blue = decode_image(_bytes(cmyk, "TIFF"), name="a").rgb.getpixel((1, 1))
    assert red > 200
    assert green < 60
    assert blue < 60


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    rgb = np.asarray(decode_image(_bytes(Image.fromarray(values)), name="a").rgb)
    assert rgb[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (rgb[..., 0] == rgb[..., 2]).all()


def test_palette_with_alpha_is_laid_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    data = _bytes(image, transparency=0)  # colour 0 is transparent
    rgb = np.asarray(decode_image(data, name="a").rgb)
    assert rgb[0].tolist() == [[255, 255, 255], [200, 100, 50]]


def test_half_transparent_is_blended_with_white() -> None:
    data = _bytes(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert decode_image(data, name="a").rgb.getpixel((0, 0))[0] == pytest.approx(127, abs=1)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert decode_image(data, name="a").rgb.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(orientation: int) -> None:
    upright = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3) * 40
    # what a camera stores for each orientation, written out from the EXIF definition
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(np.repeat(stored[..., None], 3, axis=2)))
    decoded = decode_image(_bytes(image, exif=exif), name="a")
    assert np.array_equal(np.asarray(decoded.oriented(exif=True))[..., 0], upright)
    assert np.array_equal(np.asarray(decoded.oriented(exif=False))[..., 0], stored)


def test_orientation_outside_the_standard_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode_image(_bytes(Image.new("RGB", (2, 2)), exif=exif), name="a").orientation == 1


def test_reasons() -> None:
    jpeg = _bytes(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    assert _reason(b"") == "empty"
    assert _reason(b"just some words in a file\n") == "not-an-image"
    assert _reason(jpeg[: len(jpeg) // 2]) == "truncated"
    assert _reason(b"%PDF-1.4 not a photograph") == "not-an-image"


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_size_limit_is_checked_before_pixels_are_decoded() -> None:
    assert _reason(_png_header(20_000, 10_000)) == "too-large"
    # below a raised limit the missing pixels are what is wrong, also far above Pillow's own limit
    assert _reason(_png_header(20_000, 10_000), max_pixels=300_000_000) == "truncated"


def test_size_limit_is_a_setting() -> None:
    data = _bytes(Image.new("RGB", (10, 10)))
    assert decode_image(data, name="a", max_pixels=100).rgb.size == (10, 10)
    assert _reason(data, max_pixels=99) == "too-large"


_SEEDS = [
    _bytes(Image.effect_noise((24, 16), 60).convert("RGB"), fmt)
    for fmt in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(_SEEDS), st.data())
def test_damaged_bytes_decode_or_fail_with_a_reason(seed: bytes, data: st.DataObject) -> None:
    damaged = bytearray(seed[: data.draw(st.integers(1, len(seed)))])
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_image(bytes(damaged), name="x.jpg", max_pixels=1_000_000)
    except ImageError as error:
        assert error.reason in {"truncated", "not-an-image", "too-large", "empty"}
    else:
        assert decoded.rgb.mode == "RGB"
