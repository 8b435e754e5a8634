"""Encoded images into pixels, one way for training, calibration and reports."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what undoes it, as in PIL.ImageOps.exif_transpose. That one also writes the
EXIF anew, and fails where a camera wrote a field that Pillow can't."""

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SCALED_TO_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose values Pillow scales to 0..65535 where it gives an image the mode I."""


def decode_image(data: bytes) -> Image.Image:
    """An encoded image in RGB as a viewer shows it; ValueError if it can't be decoded.

    It stands upright, as transformers.image_utils.load_image has it. What is transparent lies on
    white, as in to_rgb of the reference's qwen_vl_utils: the colours under it are arbitrary, and
    mostly black.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return _in_rgb(_upright(image), image.format)
    except MemoryError:
        raise
    except Exception as error:
        # Beside OSError, Pillow's readers let through what they stumble on in broken bytes:
        # RuntimeError (AVIF), NotImplementedError (DDS), TypeError, struct.error and others.
        raise ValueError(str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:
        # Pillow raises what it likes of a broken EXIF, and that is no reason to lose the pixels.
        return image
    return image if method is None else image.transpose(method)


def _in_rgb(image: Image.Image, form: str | None) -> Image.Image:
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and form in SCALED_TO_SIXTEEN_BITS):
        return _from_sixteen_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"{form} of mode {image.mode} does not say which values are black, white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey by its upper byte, which is what Pillow takes of 16 bits a colour. Its own conversion
    of grey makes everything but the darkest 256 values white."""
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
