"""Reading of images, and writing of JPEG bytes and contact sheets."""

import io
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from fantasy_jax.errors import MediaError
from fantasy_jax.files import atomic_write
from fantasy_jax.media.paths import check_exists
from fantasy_jax.typing import UInt8

_SHEET = ("Software", "fantasy_jax contact sheet")
"""Text of a PNG file that says what it is."""


def read_image(path: str | Path) -> Image.Image:
    """Reads an image as 8-bit RGB.

    The EXIF orientation is applied; 16-bit, grey and palette images are converted; transparent areas are
    composited over white (the official code drops the alpha channel and shows the colour below it).

    Raises:
        MediaError: The file is missing, not an image, or truncated.
    """
    check_exists(path, "image")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: not a readable image; use a PNG, JPEG or WebP file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: the image is damaged or truncated ({error}); save it again") from error
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image, path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Converts 16- and 32-bit grey images; Pillow would clip their values at 255."""
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise MediaError(f"{path}: the image contains values that are not finite; save it with 8 bits")
    largest = {"F": 1.0 if values.max(initial=0) <= 1 else 255.0}.get(image.mode, 65535.0)
    return Image.fromarray((values / largest * 255).round().clip(0, 255).astype(np.uint8))


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
