"""Synthetic talking heads: short clips of procedural faces with synthetic speech and known mouth movements.

A clip is a function of the config, its split and its index. The dataset is written as TFDS array records:

    .venv/bin/python -m fantasy_jax.miniature.synthetic --config=configs/tiny.py --output=DIR
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from fantasy_jax import cli, media
from fantasy_jax.config import PositiveInt, Seed, Settings, section
from fantasy_jax.data.records import Record, write_dataset
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import check_writable
from fantasy_jax.miniature.faces import (
    Performance,
    SyntheticFace,
    draw_face,
    face_box,
    render_batch,
    stack_faces,
)
from fantasy_jax.miniature.voices import Speech, draw_voice, speak
from fantasy_jax.preprocessing.face_crop import points_in_box
from fantasy_jax.typing import Float
from fantasy_jax.video import SAMPLE_RATE, VideoConfig

Split = Literal["train", "test", "unseen"]
"""The faces of `unseen` have sizes outside the range of the other two."""

PROMPTS = {
    "calm": (
        "A person is talking calmly.",
        "A calm person speaks and hardly moves.",
        "Someone talks with a still head.",
    ),
    "lively": (
        "A person is talking in a lively way.",
        "An excited person speaks and moves a lot.",
        "Someone talks with a restless head.",
    ),
}
"""Prompts by manner; they indicate how much the head moves, which the first frame does not show."""

EXAMPLES = """\
examples:
  write the training and test clips:
  python -m fantasy_jax.miniature.synthetic --config=configs/tiny.py --output=out/data

  write portrait, speech and video of test clip 7:
  python -m fantasy_jax.miniature.synthetic --config=configs/tiny.py --output=out/example --example=7
"""

_SEEDS = {"train": 0, "test": 1, "unseen": 2}
_BATCH_SIZE = 16


@dataclass(frozen=True)
class SyntheticConfig(Settings):
    """A synthetic dataset; `VideoConfig` gives size, length and frame rate of its clips.

    Attributes:
        train_clips: Number of training clips.
        test_clips: Number of held-out clips, with other faces, voices and words.
        seed: Seed of all random draws.
    """

    train_clips: PositiveInt = 4096
    test_clips: PositiveInt = 64
    seed: Seed = 0


@dataclass(frozen=True)
class SyntheticClip:
    """A clip before rendering.

    Attributes:
        face: The face.
        performance: Its motion.
        speech: The speech, with its mouth movements.
        prompt: The prompt.
        face_motion: Intensity of the facial motion, from 0 to 1: at high values the mouth opens wider, the
            head turns and the eyes blink more often. Neither prompt nor first frame indicates it.
        body_motion: Intensity of the motion of head and shoulders, from 0 to 1; the prompt indicates it
            roughly.
    """

    face: SyntheticFace
    performance: Performance
    speech: Speech
    prompt: str
    face_motion: float
    body_motion: float


def check_video(video: VideoConfig) -> None:
    """Raises a ConfigError unless clips of this size can be rendered: square, at least 32 pixels."""
    if video.height != video.width or video.height < 32:
        raise ConfigError(
            f"video is {video.height} x {video.width}; synthetic clips must be square, at least 32 x 32"
        )


def plan_clip(
    config: SyntheticConfig,
    video: VideoConfig,
    split: Split,
    index: int,
    *,
    face_motion: float | None = None,
    body_motion: float | None = None,
) -> SyntheticClip:
    """Draws everything that decides a clip.

    Args:
        config: The dataset; its seed is used.
        video: Length and frame rate.
        split: Split of the dataset.
        index: Index of the clip in the split.
        face_motion: Replaces the random intensity of the facial motion, if given.
        body_motion: Replaces the random intensity of the body motion, if given.
    """
    rng = np.random.default_rng([config.seed, _SEEDS[split], index])
    face = draw_face(rng, unseen=split == "unseen")
    speech = speak(rng, draw_voice(rng), num_frames=video.num_frames, fps=video.fps)
    manner = ("calm", "lively")[rng.integers(2)]
    prompt = PROMPTS[manner][rng.integers(len(PROMPTS[manner]))]
    low, high = (0.0, 0.3) if manner == "calm" else (0.6, 1.0)
    drawn = rng.uniform((0, low), (1, high)).tolist()
    face_motion = drawn[0] if face_motion is None else face_motion
    body_motion = drawn[1] if body_motion is None else body_motion
    performance = _draw_performance(rng, video, speech, face_motion, body_motion)
    return SyntheticClip(face, performance, speech, prompt, face_motion, body_motion)


def _draw_performance(
    rng: np.random.Generator, video: VideoConfig, speech: Speech, face_motion: float, body_motion: float
) -> Performance:
    seconds = np.arange(video.num_frames) / video.fps

    def sway(amplitude: float, hertz: tuple[float, float] = (0.4, 1.6)) -> Float[np.ndarray, " T"]:
        """A slow wave that starts at 0, the pose of the first frame."""
        wave = np.sin(2 * np.pi * (rng.uniform(*hertz) * seconds + rng.uniform()))
        return (amplitude * (wave - wave[0])).astype(np.float32)

    stress = np.convolve(np.pad(speech.opening, 4), np.hanning(9) / np.hanning(9).sum(), mode="valid")
    nod = 0.07 * body_motion * (stress - stress[0])  # nod on stressed syllables
    return Performance(
        opening=(0.7 + 0.6 * face_motion) * speech.opening,
        rounding=speech.rounding,
        blink=_draw_blink(rng, seconds, face_motion),
        shift_x=sway(0.03 * body_motion),
        shift_y=sway(0.012 * body_motion) + 0.5 * nod.astype(np.float32),
        roll=sway(0.04 * body_motion) + np.float32(rng.normal(0, 0.03)),
        turn=sway(0.03 * face_motion) + np.float32(rng.normal(0, 0.04)),
        nod=nod.astype(np.float32) + np.float32(rng.normal(0, 0.015)),
        body=sway(0.02 * body_motion),
    )


def _draw_blink(
    rng: np.random.Generator, seconds: Float[np.ndarray, " T"], intensity: float
) -> Float[np.ndarray, " T"]:
    """At most one blink, of about a tenth of a second; its probability grows with the intensity of motion."""
    draw, moment = rng.uniform((0, 0.1), (1, seconds[-1]))
    blinks = draw < 0.15 + 0.45 * intensity
    return (blinks * np.exp(-(((seconds - moment) / 0.055) ** 2))).astype(np.float32)


def render_clips(video: VideoConfig, clips: list[SyntheticClip]) -> Iterator[Record]:
    """Renders clips and yields one record each, with the schema of `features`.

    Raises:
        ConfigError: Clips of this size cannot be rendered.
    """
    check_video(video)
    faces = stack_faces([clip.face for clip in clips])
    performances = jax.tree.map(lambda *leaves: np.stack(leaves), *[clip.performance for clip in clips])
    pixels, lips = render_batch(faces, performances, size=video.height)
    frames = np.round((np.asarray(pixels) + 1) * 127.5).astype(np.uint8)
    masks = np.round(np.asarray(lips) * 255).astype(np.uint8)
    for clip, clip_frames, mask in zip(clips, frames, masks, strict=True):
        boxes = (face_box(clip.face, clip.performance) + 1) * video.height / 2
        yield {
            "video": clip_frames,
            "lips": mask,
            "waveform": np.round(clip.speech.waveform * 32767).astype(np.int16),
            "opening": clip.speech.opening,
            "rounding": clip.speech.rounding,
            "face_box": boxes,
            "face_points": points_in_box(boxes[0]),
            "face_motion": np.full(video.num_frames, clip.face_motion, np.float32),
            "body_motion": np.full(video.num_frames, clip.body_motion, np.float32),
            "prompt": clip.prompt,
        }


def records(config: SyntheticConfig, video: VideoConfig, split: Split, count: int) -> Iterator[Record]:
    """Yields the first `count` records of a split, with a progress bar from 256 on."""
    with tqdm(total=count, desc=f"Clips ({split})", unit="clip", disable=count < 256) as bar:
        for start in range(0, count, _BATCH_SIZE):
            indices = range(start, min(start + _BATCH_SIZE, count))
            yield from render_clips(video, [plan_clip(config, video, split, i) for i in indices])
            bar.update(len(indices))


def features(video: VideoConfig) -> dict[str, tfds.features.FeatureConnector]:
    """TFDS schema of a record.

    `video` and the lip mask `lips` are bytes, `waveform` is 16 kHz audio, `opening` and `rounding` describe
    the mouth per frame, `face_box` is left, top, right, bottom of the head in pixels, and `face_points` are
    the points by which `preprocessing.face_crop` cuts the face out of the first frame.
    """
    frames, size = video.num_frames, video.size
    zlib = tfds.features.Encoding.ZLIB
    return {
        "video": tfds.features.Tensor(shape=(frames, *size, 3), dtype=np.uint8, encoding=zlib),
        "lips": tfds.features.Tensor(shape=(frames, *size), dtype=np.uint8, encoding=zlib),
        "waveform": tfds.features.Tensor(shape=(video.num_samples,), dtype=np.int16, encoding=zlib),
        "opening": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "rounding": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "face_box": tfds.features.Tensor(shape=(frames, 4), dtype=np.float32),
        "face_points": tfds.features.Tensor(shape=(5, 2), dtype=np.float32),
        "face_motion": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "body_motion": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "prompt": tfds.features.Text(),
    }


def write_clips(config: SyntheticConfig, video: VideoConfig, directory: str | Path) -> Path:
    """Writes the splits train and test below a directory, unless they exist.

    Returns:
        The folder of the records.

    Raises:
        ConfigError: The folder holds a dataset made with other settings, or clips of this size cannot be
            rendered.
    """
    check_video(video)
    counts = {"train": config.train_clips, "test": config.test_clips}
    splits = {split: records(config, video, split, count) for split, count in counts.items()}
    settings = asdict(config) | {"video": asdict(video)}
    return write_dataset("synthetic_talking_heads", directory, partial(features, video), splits, settings)


def write_example(config: SyntheticConfig, video: VideoConfig, index: int, folder: Path) -> None:
    """Writes a test clip as `portrait.png` (its first frame), `speech.wav` and `clip.mp4`."""
    for name in ("portrait.png", "speech.wav", "clip.mp4"):
        check_writable(folder / name)
    (clip,) = render_clips(video, [plan_clip(config, video, "test", index)])
    Image.fromarray(clip["video"][0]).save(folder / "portrait.png")
    media.write_audio(folder / "speech.wav", clip["waveform"], SAMPLE_RATE)
    media.write_video(folder / "clip.mp4", clip["video"], video.fps, audio=folder / "speech.wav")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.synthetic",
        description="Writes synthetic talking heads as a TFDS dataset of array records.",
        epilog=EXAMPLES,
    )
    cli.add_config_argument(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--example",
        type=cli.integer(0),
        metavar="N",
        help="write portrait, speech and video of test clip N instead of the dataset",
    )
    arguments, config = cli.parse(parser, argv)
    data = section(SyntheticConfig, config, "data")
    video = section(VideoConfig, config, "video")
    if arguments.example is not None:
        write_example(data, video, arguments.example, Path(arguments.output))
        print(f"Wrote {arguments.output}: portrait.png, speech.wav and clip.mp4")
        return
    folder = write_clips(data, video, arguments.output)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.synthetic")
