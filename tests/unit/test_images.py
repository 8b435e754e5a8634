"""Pixels of encoded images; all are wider than high and have distinct pixels, so that a turn or a
mirror image shows."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from checkpoint_tools.images import decode_image

Pixels = NDArray[np.uint8]

GREY: Pixels = np.arange(0, 255, 17, dtype=np.uint8).reshape(3, 5)
COLOURS: Pixels = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)
ALPHA: Pixels = np.array([[0, 255, 0, 51, 255], [0, 0, 204, 255, 0], [255, 102, 0, 0, 0]], np.uint8)
STORED = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.swapaxes(0, 1),
    6: np.rot90(COLOURS),
    7: COLOURS[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(COLOURS, -1),
}
"""EXIF orientation -> what a camera stores of COLOURS with it."""


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Pixels:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def in_three(grey: Pixels) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2)


def on_white(pixels: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[:, :, None] / 255
    return np.round(pixels * share + 255 * (1 - share)).astype(np.uint8)


@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
@pytest.mark.parametrize("orientation", list(STORED))
def test_a_photograph_stands_upright(form: str, options: dict[str, Any], orientation: int) -> None:
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    found = decoded(encoded(image, form, exif=exif, **options))
    np.testing.assert_array_equal(found, COLOURS)


def test_a_grey_scan_of_16_bits_stands_upright() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(np.rot90(GREY.astype(np.uint16) * 256).copy())
    np.testing.assert_array_equal(decoded(encoded(stored, exif=exif)), in_three(GREY))


def test_pixels_outlive_a_broken_exif() -> None:
    data = encoded(Image.fromarray(COLOURS), exif=b"Exif\0\0MM\0\x07 no TIFF")
    np.testing.assert_array_equal(decoded(data), COLOURS)


def test_an_orientation_counts_beside_a_field_that_can_not_be_written_again() -> None:
    """A resolution in letters, of which ImageOps.exif_transpose makes a TypeError."""
    fields = struct.pack(">HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)
    fields += struct.pack(">HHI4s", ExifTags.Base.XResolution, 2, 3, b"72")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + fields + bytes(4)
    stored = Image.fromarray(np.rot90(COLOURS).copy())
    np.testing.assert_array_equal(decoded(encoded(stored, exif=exif)), COLOURS)


def palette_image() -> Image.Image:
    """Colour 0 is black and so is colour 1, as in drawings whose background is transparent."""
    image = Image.fromarray((GREY // 17 % 3).astype(np.uint8))
    image.putpalette([0, 0, 0, 0, 0, 0, 200, 100, 50])
    return image


TRANSPARENT: dict[str, tuple[bytes, Pixels]] = {
    "RGBA": (
        encoded(Image.fromarray(np.dstack([COLOURS, ALPHA]))),
        on_white(COLOURS, ALPHA),
    ),
    "LA": (
        encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])),
        on_white(in_three(GREY), ALPHA),
    ),
    "P, one colour": (
        encoded(palette_image(), transparency=0),
        np.array([[255] * 3, [0] * 3, [200, 100, 50]], np.uint8)[GREY // 17 % 3],
    ),
    "P, alpha of each colour": (
        encoded(palette_image(), transparency=bytes([51, 255, 0])),
        np.array([[204] * 3, [0] * 3, [255] * 3], np.uint8)[GREY // 17 % 3],
    ),
    "L, one value": (
        encoded(Image.fromarray(GREY), transparency=34),
        in_three(np.where(GREY == 34, 255, GREY).astype(np.uint8)),
    ),
    "RGB, one colour": (
        encoded(Image.fromarray(COLOURS), transparency=(17, 238, 8)),
        np.where(GREY[:, :, None] == 17, 255, COLOURS).astype(np.uint8),
    ),
}


@pytest.mark.parametrize("kind", list(TRANSPARENT))
def test_what_is_transparent_is_white(kind: str) -> None:
    data, wanted = TRANSPARENT[kind]
    np.testing.assert_array_equal(decoded(data), wanted)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_what_is_opaque_is_as_it_was(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    np.testing.assert_array_equal(decoded(encoded(image)), np.asarray(image.convert("RGB")))


DEEP = GREY.astype(np.uint16) * 256 + np.arange(15, dtype=np.uint16).reshape(3, 5)


def in_pgm(values: NDArray[np.uint16]) -> bytes:
    return b"P5 5 3 65535\n" + values.astype(">u2").tobytes()


def big_endian_tiff(values: NDArray[np.uint16]) -> bytes:
    """3 rows of 5, one strip after the eight fields."""
    fields = {256: 5, 257: 3, 258: 16, 259: 1, 262: 1, 273: 110, 278: 3, 279: 30}
    head = b"MM\0*\0\0\0\x08" + struct.pack(">H", len(fields))
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in fields.items())
    return head + entries + bytes(4) + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(DEEP)),
        encoded(Image.fromarray(DEEP), "TIFF"),
        big_endian_tiff(DEEP),
        in_pgm(DEEP),
    ],
    ids=["PNG", "TIFF", "big-endian TIFF", "PGM"],
)
def test_grey_of_16_bits_keeps_its_shades(data: bytes) -> None:
    np.testing.assert_array_equal(decoded(data), in_three(GREY))


def test_grey_of_16_bits_with_a_transparent_value() -> None:
    """34 * 256 is another grey than the transparent one, which has the same upper byte."""
    values = DEEP.copy()
    values[0, 0] = 34 * 256
    data = encoded(Image.fromarray(values))
    key = struct.pack(">4sH", b"tRNS", int(DEEP[0, 2]))
    at = data.index(b"IDAT") - 4
    data = data[:at] + struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key)) + data[at:]
    wanted = GREY.copy()
    wanted[0, 0], wanted[0, 2] = 34, 255
    np.testing.assert_array_equal(decoded(data), in_three(wanted))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_white_are_refused(dtype: type) -> None:
    data = encoded(Image.fromarray(GREY.astype(dtype)), "TIFF")
    with pytest.raises(ValueError, match="TIFF of mode [FI] does not say which values are black"):
        decode_image(data)


def headless_dds() -> bytes:
    """A pixel format that Pillow has no reader for."""
    data = bytearray(encoded(Image.fromarray(COLOURS), "DDS"))
    data[80:84] = struct.pack("<I", 0x10000)
    return bytes(data)


def cut_avif() -> bytes:
    """The head, which names the size, is whole."""
    data = encoded(Image.fromarray(np.tile(COLOURS, (20, 20, 1))), "AVIF")
    return data[:-40] + bytes(40)


@pytest.mark.parametrize("data", [headless_dds(), cut_avif()], ids=["DDS", "AVIF"])
def test_what_a_reader_stumbles_on_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_image(data)


def test_no_memory_is_not_the_fault_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Image.Image) -> None:
        raise MemoryError

    data = encoded(Image.fromarray(COLOURS), "BMP")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        decode_image(data)
