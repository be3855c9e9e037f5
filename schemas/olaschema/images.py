"""Safe decoding of one image, the same in both halves: what the teacher saw is what the student gets."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from olaschema.errors import ImageError

# Decoders of ordinary photographs. Others (EPS, PSD, PDF …) start programs or are rarely fuzzed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"))
DEFAULT_MAX_PIXELS = 100_000_000


# Pillow's decoders raise whichever of these the damaged byte leads to.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error,
)  # fmt: skip
# Pillow refuses what exceeds its own fixed limit; ours is a setting, checked below before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class DecodedImage:
    """An RGB image as stored (not rotated), and the EXIF orientation that was found (1 where none)."""

    rgb: Image.Image
    orientation: int

    def oriented(self, *, exif: bool) -> Image.Image:
        """Return the RGB image, turned upright by its EXIF orientation if `exif`."""
        method = _TRANSPOSE.get(self.orientation) if exif else None
        return self.rgb.transpose(method) if method is not None else self.rgb


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> DecodedImage:
    """Decode image bytes to 8-bit RGB, the first frame of an animation.

    CMYK is converted, 16-bit greyscale is scaled by its range of 65535 to 8 bits, and transparency is laid over
    white. `max_pixels` is checked from the header, before pixels are decoded.

    Raises ImageError with reason `empty`, `not-an-image`, `too-large` or `truncated`; `name` is used in the
    message.
    """
    if not data:
        raise ImageError("empty", f"{name}: the file is empty")
    with _pillow_warnings_off():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(
                "not-an-image",
                f"{name}: not an image that can be read ({_kind(data)})",
                f"Readable formats: {', '.join(FORMATS)}.",
            ) from error
        except _DECODER_ERRORS as error:
            raise ImageError("truncated", f"{name}: the image header is damaged: {error}") from error
        if image.width * image.height > max_pixels:
            raise _too_large(name, image.size, max_pixels)
        try:
            image.seek(0)
            image.load()
            orientation = int(image.getexif().get(0x0112, 1) or 1)
            rgb = _to_rgb(image)
        except _DECODER_ERRORS as error:
            raise ImageError("truncated", f"{name}: the image data is damaged or cut short: {error}") from error
        except MemoryError as error:
            raise ImageError("too-large", f"{name}: decoding ran out of memory") from error
    return DecodedImage(rgb, orientation if orientation in _TRANSPOSE else 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files open as I;16 or, for some PNGs, as I; wider ranges have no standard white
        scaled = np.clip(np.rint(values / 257.0), 0, 255) if image.mode != "F" else _float_grey(values)
        return Image.fromarray(scaled.astype(np.uint8), mode="L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _float_grey(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("a float image holds values that are not finite")
    return np.clip(np.rint(values * 255.0), 0, 255)


def _too_large(name: str, size: tuple[int, int], limit: int) -> ImageError:
    shown = f"{size[0]} × {size[1]} = {size[0] * size[1] / 1e6:.0f} megapixels"
    return ImageError(
        "too-large",
        f"{name}: {shown}, the limit is {limit / 1e6:g} megapixels",
        "If it is meant to be that large, raise the limit: --max-megapixels of olapipe, max_pixels of olatrain.",
    )


def _kind(data: bytes) -> str:
    head = data[:256]
    if not any(byte < 9 or 13 < byte < 32 for byte in head):
        return "it looks like text"
    return f"it starts with {head[:8].hex(' ')}"


@contextmanager
def _pillow_warnings_off() -> Iterator[None]:
    # The limit is ours, checked from the header; Pillow's own warning about large images says nothing more,
    # and its warnings about odd EXIF or palettes concern nobody here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
