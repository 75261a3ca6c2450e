"""Colour spaces that files state without an ICC profile: by numbers of ITU-T H.273, or in EXIF."""

import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from fantasy_jax.media.frames import TONE_MAPS, srgb_from_linear
from fantasy_jax.media.primaries import ADOBE, BT709, PRIMARIES, to_bt709
from fantasy_jax.typing import UInt8

_SDR = (1, 6, 13, 14, 15)
"""Transfer functions of BT.709, BT.601, sRGB and BT.2020, which are for the same displays."""
_ADOBE_GAMMA = 563 / 256
_UNCALIBRATED = 65535
_ROWS = 256
"""Rows that are converted at once, which saves memory."""

Declared = tuple[int, int]
"""Primaries and transfer function, numbers of H.273."""
SRGB: Declared = (BT709, 13)


def declared_space(image: Image.Image, path: str | Path) -> Declared | None:
    """The colour space that a file states other than by an ICC profile; None if it is unknown or not stated.

    PNG's chunk `cICP` has precedence over a profile (PNG specification, section 4.3); the others have not.

    Args:
        image: As Pillow opens it.
        path: Its file; PNG's chunk `cICP` is read from there, since Pillow does not read it.
    """
    space = _known(_cicp(path))
    if space is None and not image.info.get("icc_profile"):
        if nclx := image.info.get("nclx_profile"):
            return _known((nclx["color_primaries"], nclx["transfer_characteristics"]))
        if _is_adobe_rgb(image):
            return ADOBE, 0
    return space


def _known(space: Declared | None) -> Declared | None:
    if space is None or space[0] not in PRIMARIES or space[1] not in (*_SDR, *TONE_MAPS):
        return None
    return SRGB if space[0] == BT709 and space[1] in _SDR else space


def declared_to_srgb(image: Image.Image, space: Declared) -> Image.Image:
    """Converts an RGB image of 8 bits per channel to sRGB; PQ and HLG are tone-mapped, as in videos."""
    pixels = np.array(image)
    convert = _tone_mapped if space[1] in TONE_MAPS else _converted
    for start in range(0, len(pixels), _ROWS):
        rows = pixels[start : start + _ROWS]
        rows[:] = convert(rows, space)
    converted = Image.fromarray(pixels)
    converted.info.update(image.info)
    return converted


def _tone_mapped(pixels: UInt8[np.ndarray, "H W 3"], space: Declared) -> UInt8[np.ndarray, "H W 3"]:
    signal = (pixels.astype(np.uint32) * 4095 // 255).astype(np.uint16)
    return TONE_MAPS[space[1]](signal, space[0])


def _converted(pixels: UInt8[np.ndarray, "H W 3"], space: Declared) -> UInt8[np.ndarray, "H W 3"]:
    levels = np.linspace(0, 1, 256)
    if space[0] == ADOBE:
        linear = levels**_ADOBE_GAMMA
    else:
        linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    light = linear.astype(np.float32)[pixels] @ to_bt709(space[0]).T
    return (255 * srgb_from_linear(light.clip(0, 1))).round().astype(np.uint8)


def _cicp(path: str | Path) -> Declared | None:
    """Primaries and transfer function of a PNG file's chunk `cICP`, which comes before the pixels."""
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return None
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"cICP" and len(content := file.read(length)) == 4:
                return content[0], content[1]
            if kind in (b"IDAT", b"cICP"):
                break
            file.seek(length + 4, 1)
    return None


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF says Adobe RGB, as the file system of cameras (DCF 2.0) has it."""
    exif = image.getexif()
    stated = exif.get_ifd(ExifTags.IFD.Exif)
    if stated.get(ExifTags.Base.ColorSpace) != _UNCALIBRATED or ExifTags.IFD.Interop not in stated:
        return False
    return str(exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex, "")).startswith("R03")
