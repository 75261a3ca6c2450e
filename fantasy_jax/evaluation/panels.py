"""One picture of several clips that explains itself: what drives each clip above, the clip below.

    .venv/bin/python -m fantasy_jax.evaluation.panels out/demo.png --row=out/demo.mp4 --row=out/act.mp4,d.mp4

A row shows a clip's frames below those of its driving videos or, without any, below its sound's waveform.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fantasy_jax import cli, media
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.typing import Float, UInt8
from fantasy_jax.video import SAMPLE_RATE

EXAMPLES = """\
examples:
  a talking portrait, a portrait that is driven by a video, and two people who are driven by a video each:
  python -m fantasy_jax.evaluation.panels out/demo.png --row=out/demo.mp4 \\
      --row=out/act.mp4,driver.mp4 --row=out/two.mp4,driver_1.mp4,driver_2.mp4
"""

WIDTH = 1000
"""Of the picture, in pixels."""
_MARGIN, _GAP, _LABELS = 12, 4, 78
"""Around the picture, between frames, and the width of the labels on the left, in pixels."""
_TITLE, _TIMES, _WAVEFORM = 30, 20, 44
"""Heights of titles, of times below frames and of waveforms, in pixels."""
_FRAMES, _MIN_SIDE = 8, 100
"""Frames beside each other, and the least width of a person's part of them, in pixels."""
_INK, _PALE, _BLUE = (20, 20, 20), (110, 110, 110), (40, 100, 180)


@dataclass(frozen=True)
class Row:
    """A clip and what drives it.

    Attributes:
        result: The clip, a video file.
        drivers: Driving videos, from left to right; none: the sound of the clip drives it.
    """

    result: Path
    drivers: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """What the row shows."""
        if not self.drivers:
            return "A portrait talks: the speech above, the video that follows it below"
        if len(self.drivers) == 1:
            return "A portrait acts: the driving video above, the video that follows it below"
        count = {2: "Two", 3: "Three"}.get(len(self.drivers), len(self.drivers))
        return f"{count} people act: a driving video for each above, the video that follows them below"


def draw(rows: Sequence[Row]) -> UInt8[np.ndarray, "H 1000 3"]:
    """Draws the rows one below another.

    Raises:
        MediaError: A file cannot be read.
    """
    return np.vstack([_draw_row(row) for row in rows])


def _draw_row(row: Row) -> UInt8[np.ndarray, "H 1000 3"]:
    video, fps = media.read_video(row.result)
    available = WIDTH - 2 * _MARGIN - _LABELS
    people = max(len(row.drivers), 1)
    count = max(min(_FRAMES, available // (people * _MIN_SIDE), len(video)), 1)
    step = available // count
    # Each frame is the one in the middle of the part of the clip that its column stands for.
    chosen = [int((i + 0.5) * len(video) / count) for i in range(count)]
    if row.drivers:
        above = _driving_frames(row.drivers, fps, chosen, step - _GAP)
    else:
        sound = media.read_audio(row.result, seconds=len(video) / fps)
        lasting = round(len(video) / fps * SAMPLE_RATE)  # of the frames below
        sound = np.pad(sound[:lasting], (0, max(lasting - len(sound), 0)))
        above = [waveform(sound, count * step - _GAP, _WAVEFORM)]
    below = [_fit(video[i], step - _GAP) for i in chosen]
    middle = _TITLE + len(above[0]) + _GAP
    end = middle + len(below[0])
    canvas = Image.new("RGB", (WIDTH, end + _TIMES + _MARGIN), "white")
    pen, left = ImageDraw.Draw(canvas), _MARGIN + _LABELS
    pen.text((_MARGIN, 6), row.title, fill=_INK, font=ImageFont.load_default(17))
    driven_by = ("speech", "driver", "drivers")[min(len(row.drivers), 2)]
    for label, top, images in ((driven_by, _TITLE, above), ("result", middle, below)):
        place = (_MARGIN, top + len(images[0]) / 2)
        pen.text(place, label, fill=_INK, font=ImageFont.load_default(16), anchor="lm")
        for index, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (left + index * step, top))
    for index, frame in enumerate(chosen):
        time = f"{frame / fps:.2f} s"
        pen.text((left + index * step, end + 2), time, fill=_PALE, font=ImageFont.load_default(13))
    return np.asarray(canvas)


def _driving_frames(
    paths: Sequence[Path], fps: float, chosen: Sequence[int], width: int
) -> list[UInt8[np.ndarray, "H {width} 3"]]:
    """Frames of driving videos beside each other, at these frames of a clip; the last one of each stays."""
    columns = []
    for path in paths:
        frames = list(islice(media.stream_frames(path, fps), chosen[-1] + 1))
        columns.append([_fit(frames[min(i, len(frames) - 1)], width // len(paths)) for i in chosen])
    height = max(len(frames[0]) for frames in columns)
    fill = {"constant_values": 255}
    filled = [
        [np.pad(x, ((height - len(x), 0), (0, 0), (0, 0)), **fill) for x in frames] for frames in columns
    ]
    rest = np.full((height, width % len(paths), 3), 255, np.uint8)
    return [np.hstack([*beside, rest]) for beside in zip(*filled, strict=True)]


def _fit(frame: UInt8[np.ndarray, "H W 3"], width: int) -> UInt8[np.ndarray, "_ {width} 3"]:
    size = (width, round(width * frame.shape[0] / frame.shape[1]))
    enlarged = width > frame.shape[1]
    return cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC if enlarged else cv2.INTER_AREA)


def waveform(
    sound: Float[np.ndarray, " n"], width: int, height: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Draws the extremes of a sound in each column, the loudest as high as the drawing."""
    drawn = np.full((height, width, 3), 244, np.uint8)
    loudest = max(float(np.abs(sound).max()), 1e-6)
    for column, part in enumerate(np.array_split(sound, width)):
        if len(part):
            top, bottom = ((1 - end / loudest) / 2 * (height - 1) for end in (part.max(), part.min()))
            drawn[math.floor(top) : math.ceil(bottom) + 1, column] = _BLUE
    return drawn


def parse_row(text: str) -> Row:
    """A row of the command line: the clip, and its driving videos after it, separated by commas.

    Raises:
        ConfigError: A name is empty.
    """
    names = text.split(",")
    if not all(names):
        raise ConfigError(
            f"--row={text}: give the clip, and its driving videos after it, separated by commas"
        )
    return Row(Path(names[0]), tuple(map(Path, names[1:])))


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.evaluation.panels",
        description="Draws clips below what drives them, in one picture.",
        epilog=EXAMPLES,
    )
    parser.add_argument("output", metavar="PNG", help="picture to write")
    parser.add_argument(
        "--row",
        action="append",
        required=True,
        metavar="CLIP[,DRIVER...]",
        help="a clip, and the videos that drive it, if any; can be given several times",
    )
    arguments = parser.parse_args(argv)
    rows = [parse_row(text) for text in arguments.row]
    if Path(arguments.output).suffix.lower() != ".png":
        raise ConfigError(f"{arguments.output}: the picture is a PNG; give a name that ends with .png")
    check_outputs([arguments.output], [path for row in rows for path in (row.result, *row.drivers)])
    drawn = draw(rows)
    with atomic_write(arguments.output) as partial:
        Image.fromarray(drawn).save(partial, format="PNG")
    print(f"Wrote {arguments.output}: {drawn.shape[1]} x {drawn.shape[0]} pixels")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.evaluation.panels")
