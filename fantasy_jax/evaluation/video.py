"""How well a finished video goes along with its sound and its portrait, and how much moves in it.

    python -m fantasy_jax.evaluation.video out/demo.mp4 --image=portrait.png

There is no truth to compare with, so the opening that is read from the pixels is correlated with the sound's
energy: mouths open on loud syllables, and pauses are silent. Real talkers reach about 0.4 to 0.6 in this.
"""

import json

import numpy as np

from fantasy_jax import cli, media
from fantasy_jax.config import ConfigError
from fantasy_jax.data.preprocessing import fit_picture
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.evaluation.motion import motion
from fantasy_jax.evaluation.mouth import correlation, mouth_opening
from fantasy_jax.typing import Float, UInt8

_WINDOW = 0.08
"""Seconds of sound that count for a frame: about a short syllable's half."""

MIDDLE = (0.22, 0.12, 0.78, 0.88)
"""Left, top, right, bottom of the head in a usual portrait, as shares of the picture."""


def sound_energy(
    waveform: Float[np.ndarray, " samples"], num_frames: int, fps: int | float
) -> Float[np.ndarray, " T"]:
    """Root mean square of the sound around the middle of every video frame.

    Args:
        waveform: 16 kHz; silence follows where it is too short.
        num_frames: Video frames T.
        fps: Of them a second.
    """
    half = int(_WINDOW / 2 * SAMPLE_RATE)
    window = np.hanning(2 * half)
    last = int(np.ceil(num_frames / fps * SAMPLE_RATE)) + half
    padded = np.pad(waveform, (half, max(last - waveform.size, 0)))
    middles = ((np.arange(num_frames) + 0.5) / fps * SAMPLE_RATE).astype(int)
    return np.sqrt([np.average(padded[i : i + 2 * half] ** 2, weights=window) for i in middles])


def psnr(one: UInt8[np.ndarray, "*n"], other: UInt8[np.ndarray, "*n"]) -> float:
    """Peak signal-to-noise ratio of two pictures or videos of one size, in dB; 100 where they are equal."""
    return float(-10 * np.log10(np.square((one.astype(np.float64) - other) / 255).mean() + 1e-10))


def main(argv: list[str] | None = None) -> None:
    """Measures from the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.evaluation.video",
        description="Measures how well a video's mouth goes along with its sound.",
        epilog="example:\n  python -m fantasy_jax.evaluation.video out/demo.mp4 --image=portrait.png",
    )
    parser.add_argument("video", help="an mp4 with sound")
    parser.add_argument("--image", metavar="FILE", help="the portrait, to compare the first frame with")
    parser.add_argument(
        "--face",
        default=",".join(map(str, MIDDLE)),
        metavar="L,T,R,B",
        help="left, top, right, bottom of the head in the first frame, as shares (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    arguments = parser.parse_args(argv)
    if arguments.json:
        media.check_writable(arguments.json)
    video, fps = media.read_video(arguments.video)
    energy = sound_energy(media.read_sound(arguments.video), len(video), fps)
    box = _box(arguments.face, video.shape)
    face, head = motion(video, box)
    figures = {
        "correlation_with_energy": correlation(mouth_opening(video, box), energy),
        "motion_of_face_in_percent_of_head": face,
        "motion_of_head_in_percent_of_head": head,
    }
    if arguments.image:
        picture = fit_picture(media.read_picture(arguments.image), max(video.shape[1:3]))
        figures["first_frame_psnr"] = psnr(video[0], np.asarray(picture))
    for name, value in figures.items():
        print(f"{name.replace('_', ' ') + ' ':.<40} {value:7.3f}")
    if arguments.json:
        with media.whole_or_nothing(arguments.json) as partial:
            partial.write_text(json.dumps(figures, indent=1) + "\n")


def _box(text: str, shape: tuple[int, ...]) -> Float[np.ndarray, "4"]:
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--face={text}: give four shares, as in --face=0.2,0.1,0.8,0.9") from error
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ConfigError(f"--face={text}: left must be less than right, top less than bottom, all in 0 to 1")
    height, width = shape[1:3]
    return np.array([left * width, top * height, right * width, bottom * height])


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.evaluation.video")
