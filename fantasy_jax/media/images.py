"""Reading of images, and writing of JPEG bytes and contact sheets."""

import io
import logging
import math
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from fantasy_jax.errors import MediaError
from fantasy_jax.files import atomic_write
from fantasy_jax.media.paths import check_exists
from fantasy_jax.media.profiles import to_srgb
from fantasy_jax.typing import UInt8

pillow_heif.register_heif_opener()

_KEPT = 50_000_000
"""Pixels above which an image is reduced; phones of 48 and 50 megapixels stay below."""
_DECODABLE = 256_000_000
"""Pixels that are decoded at most; Pillow takes 4 bytes for each."""
_READABLE = 512_000_000
"""Pixels of a file at most; progressive JPEG takes up to 6 bytes for each, however small it is decoded."""
DAMAGED_IMAGE = (
    *(OSError, SyntaxError, ValueError, RuntimeError, EOFError, struct.error),
    *(TypeError, LookupError, ArithmeticError),
)
"""What Pillow and its plugins raise for damaged files, whose values they compute with unchecked."""
_SHEET = ("Software", "fantasy_jax contact sheet")
"""Text of a PNG file that says what it is."""


def read_image(path: str | Path) -> Image.Image:
    """Reads an image as 8-bit sRGB.

    The EXIF orientation and the ICC profile are applied; 16-bit, grey and palette images are converted;
    transparent areas are composited over white (the official code drops the alpha channel and shows the
    colour below it). Images of more than 50 megapixels are read at a reduced size, which is logged.

    Raises:
        MediaError: The file is missing, not an image, truncated, or has too many pixels for memory.
    """
    check_exists(path, "image")
    try:
        with open_image(path) as opened:
            image = ImageOps.exif_transpose(_load(opened, path))
            image = to_srgb(image, path)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: not a readable image; use a PNG, JPEG, WebP, HEIC or AVIF file") from error
    except DAMAGED_IMAGE as error:
        reason = " ".join(str(error).split())
        raise MediaError(f"{path}: the image is damaged or truncated ({reason}); save it again") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Opens an image without Pillow's limit of pixels, in place of which `_load` has one."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _load(opened: Image.Image, path: str | Path) -> Image.Image:
    """Decodes an image with at most 8 bits per channel and about 50 megapixels."""
    width, height = opened.size
    factor = _reduction(opened.size)
    if factor > 1:
        opened.draft(None, (width // factor, height // factor))  # only JPEG is decoded at a smaller size
    if width * height > _READABLE or math.prod(opened.size) > _DECODABLE:
        raise MediaError(f"{path}: {width} x {height} pixels are too many to be read; make the image smaller")
    opened.load()
    image = _to_eight_bits(opened, path) if opened.mode.startswith(("I", "F")) else opened
    if (left := _reduction(image.size)) > 1:
        if image.mode in ("1", "P", "PA"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = image.reduce(left)
    if image.size != (width, height):
        logging.getLogger(__name__).warning(
            "%s: %d x %d pixels are read as %d x %d", path, width, height, *image.size
        )
    return image


def _reduction(size: tuple[int, int]) -> int:
    """The factor by which sides are divided so that few enough pixels remain."""
    return math.ceil(math.sqrt(math.prod(size) / _KEPT))


def _to_eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Converts 16- and 32-bit grey images; Pillow would clip their values at 255."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise MediaError(f"{path}: the image contains values that are not finite; save it with 8 bits")
    largest = {"F": 1.0 if values.max(initial=0) <= 1 else 255.0}.get(image.mode, 65535.0)
    grey = np.empty(values.shape, np.uint8)
    for source, target in zip(values, grey, strict=True):  # a row at once, which saves memory
        target[:] = (source / np.float64(largest) * 255).round().clip(0, 255)
    converted = Image.fromarray(grey)
    converted.info.update(image.info)
    return converted


def encode_jpeg(image: UInt8[np.ndarray, "H W 3"], quality: int = 80) -> bytes:
    """Returns the image as the bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()


class ContactSheet:
    """A picture of evenly spaced frames, collected while a video's frames pass by."""

    def __init__(
        self,
        num_frames: int,
        fps: int | float | Fraction,
        *,
        columns: int = 6,
        rows: int = 2,
        side: int = 192,
    ):
        """Chooses the frames.

        Args:
            num_frames: Frames of the video.
            fps: Frames per second, for the labels.
            columns: Frames beside each other.
            rows: Rows of frames.
            side: Width of a frame, in pixels.
        """
        places = np.linspace(0, num_frames - 1, columns * rows).round()
        self._tiles: dict[int, np.ndarray | None] = dict.fromkeys(places.astype(int).tolist())
        self._fps, self._columns, self._side = fps, columns, side

    def collect(self, frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Passes a video's frames on, and keeps small copies of those that it shows."""
        for index, frame in enumerate(frames):
            if index in self._tiles:
                self._tiles[index] = self._tile(frame, f"{float(index / self._fps):.2f} s")
            yield frame

    def _tile(self, frame: UInt8[np.ndarray, "H W 3"], label: str) -> UInt8[np.ndarray, "y x 3"]:
        height, width = frame.shape[:2]
        size = (self._side, round(self._side * height / width / 2) * 2)
        tile = cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC)
        tile = cv2.copyMakeBorder(tile, 0, 20, 0, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        where = (4, tile.shape[0] - 5)
        cv2.putText(tile, label, where, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        return tile

    def write(self, path: str | Path) -> None:
        """Writes a PNG, each frame labelled with its time, after all frames have passed by.

        Raises:
            MediaError: The folder is not writable.
        """
        tiles = list(self._tiles.values())
        tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % self._columns)
        rows = [np.hstack(tiles[i : i + self._columns]) for i in range(0, len(tiles), self._columns)]
        with atomic_write(path) as partial:
            information = PngInfo()
            information.add_text(*_SHEET)
            Image.fromarray(np.vstack(rows)).save(partial, format="PNG", pnginfo=information)


def check_sheet(path: str | Path) -> None:
    """Checks that nothing but a contact sheet would be replaced by one.

    Raises:
        MediaError: There is a file at this path that is no contact sheet.
    """
    if not os.path.lexists(path) or not os.path.isfile(path):
        return
    key, value = _SHEET
    try:
        with Image.open(path) as image:
            ours = image.info.get(key) == value
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        ours = False
    if not ours:
        raise MediaError(
            f"{path}: is no contact sheet, but one would replace it; choose another --output, or move it"
        )
