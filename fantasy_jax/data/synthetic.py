"""Synthetic talking heads: short clips of drawn faces that speak synthetic speech, with the truth known.

What a clip shows follows from its split and number alone. Written as a TFDS dataset of array records:

    python -m fantasy_jax.data.synthetic --config=configs/tiny.py --output=DIR
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
from fantasy_jax.config import ConfigError, build
from fantasy_jax.data.face_crop import points_in_box
from fantasy_jax.data.faces import Face, Performance, draw_face, face_box, render_batch, stack_faces
from fantasy_jax.data.records import Record, write_dataset
from fantasy_jax.data.voices import SAMPLE_RATE, Speech, draw_voice, speak
from fantasy_jax.typing import Float

Split = Literal["train", "test", "unseen"]
"""`unseen` has faces whose sizes lie outside what the other two are drawn from."""

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
"""What clips are called; beyond the picture, the prompt tells how much the head moves."""

EXAMPLES = """\
examples:
  python -m fantasy_jax.data.synthetic --config=configs/tiny.py --output=out/data
  python -m fantasy_jax.data.synthetic --config=configs/tiny.py --output=out/example --example=7
"""

_SEEDS = {"train": 0, "test": 1, "unseen": 2}
_BATCH = 16


@dataclass(frozen=True)
class SyntheticConfig:
    """A synthetic dataset.

    Attributes:
        size: Height and width, in pixels.
        num_frames: Frames T of a clip, 4k + 1.
        fps: Frames a second.
        train_clips: To train with.
        test_clips: Held out: other faces, other voices, other words.
        seed: Of everything.
    """

    size: int = 64
    num_frames: int = 17
    fps: int = 25
    train_clips: int = 4096
    test_clips: int = 64
    seed: int = 0

    def __post_init__(self):
        if self.size < 32 or self.size % 16:
            raise ConfigError(f"size is {self.size}; a multiple of 16 of at least 32 is needed")
        if self.num_frames % 4 != 1 or self.num_frames < 5:
            raise ConfigError(f"num_frames is {self.num_frames}; it must be 4k + 1 and at least 5")
        if self.train_clips < 1 or self.test_clips < 1:
            raise ConfigError("train_clips and test_clips must be at least 1")


@dataclass(frozen=True)
class Clip:
    """A clip before it is drawn.

    Attributes:
        face: Who.
        performance: What the face does.
        speech: What is heard.
        prompt: What is said of it.
        face_motion: Intensity of the features' motion, from 0 to 1: livelier faces open the mouth wider,
            blink more often and turn. Nothing but this number tells.
        body_motion: Intensity of the motion of head and shoulders; the prompt tells roughly.
    """

    face: Face
    performance: Performance
    speech: Speech
    prompt: str
    face_motion: float
    body_motion: float


def plan_clip(
    config: SyntheticConfig,
    split: Split,
    index: int,
    *,
    face_motion: float | None = None,
    body_motion: float | None = None,
) -> Clip:
    """Everything that a clip shows, as a function of split and number.

    Args:
        config: Length, rate and seed.
        split: Of which dataset.
        index: Number of the clip in it.
        face_motion: In place of the drawn intensity.
        body_motion: Likewise.
    """
    rng = np.random.default_rng([config.seed, _SEEDS[split], index])
    face = draw_face(rng, unseen=split == "unseen")
    speech = speak(rng, draw_voice(rng), num_frames=config.num_frames, fps=config.fps)
    manner = ("calm", "lively")[rng.integers(2)]
    prompt = PROMPTS[manner][rng.integers(len(PROMPTS[manner]))]
    low, high = (0.0, 0.3) if manner == "calm" else (0.6, 1.0)
    drawn = rng.uniform((0, low), (1, high)).tolist()
    face_motion = drawn[0] if face_motion is None else face_motion
    body_motion = drawn[1] if body_motion is None else body_motion
    performance = _perform(rng, config, speech, face_motion, body_motion)
    return Clip(face, performance, speech, prompt, face_motion, body_motion)


def _perform(
    rng: np.random.Generator, config: SyntheticConfig, speech: Speech, face_motion: float, body_motion: float
) -> Performance:
    seconds = np.arange(config.num_frames) / config.fps

    def sway(most: float, hertz: tuple[float, float] = (0.4, 1.6)) -> Float[np.ndarray, " T"]:
        """A slow wave, from the pose that the first frame shows."""
        wave = np.sin(2 * np.pi * (rng.uniform(*hertz) * seconds + rng.uniform()))
        return (most * (wave - wave[0])).astype(np.float32)

    stress = np.convolve(np.pad(speech.opening, 4), np.hanning(9) / np.hanning(9).sum(), mode="valid")
    nod = 0.07 * body_motion * (stress - stress[0])  # heads nod with what they stress
    return Performance(
        opening=(0.7 + 0.6 * face_motion) * speech.opening,
        rounding=speech.rounding,
        blink=_blinks(rng, seconds, face_motion),
        shift_x=sway(0.03 * body_motion),
        shift_y=sway(0.012 * body_motion) + 0.5 * nod.astype(np.float32),
        roll=sway(0.04 * body_motion) + np.float32(rng.normal(0, 0.03)),
        turn=sway(0.03 * face_motion) + np.float32(rng.normal(0, 0.04)),
        nod=nod.astype(np.float32) + np.float32(rng.normal(0, 0.015)),
        body=sway(0.02 * body_motion),
    )


def _blinks(
    rng: np.random.Generator, seconds: Float[np.ndarray, " T"], intensity: float
) -> Float[np.ndarray, " T"]:
    """Lids shut for about a tenth of a second, more often in lively faces."""
    chance, moment = rng.uniform((0, 0.1), (1, seconds[-1]))
    shuts = chance < 0.15 + 0.45 * intensity
    return (shuts * np.exp(-(((seconds - moment) / 0.055) ** 2))).astype(np.float32)


def draw_clips(config: SyntheticConfig, clips: list[Clip]) -> Iterator[Record]:
    """Draws clips; yields a record of each, as `features` describes it."""
    faces = stack_faces([clip.face for clip in clips])
    acts = jax.tree.map(lambda *leaves: np.stack(leaves), *[clip.performance for clip in clips])
    pixels, lips = render_batch(faces, acts, size=config.size)
    videos = np.round((np.asarray(pixels) + 1) * 127.5).astype(np.uint8)
    masks = np.round(np.asarray(lips) * 255).astype(np.uint8)
    for clip, video, mask in zip(clips, videos, masks, strict=True):
        boxes = (face_box(clip.face, clip.performance) + 1) * config.size / 2
        yield {
            "video": video,
            "lips": mask,
            "sound": np.round(clip.speech.waveform * 32767).astype(np.int16),
            "opening": clip.speech.opening,
            "rounding": clip.speech.rounding,
            "face_box": boxes,
            "face_points": points_in_box(boxes[0]),
            "face_motion": np.full(config.num_frames, clip.face_motion, np.float32),
            "body_motion": np.full(config.num_frames, clip.body_motion, np.float32),
            "prompt": clip.prompt,
        }


def records(config: SyntheticConfig, split: Split, count: int) -> Iterator[Record]:
    """The first `count` records of a split, with a progress bar where that takes a while."""
    with tqdm(total=count, desc=f"Clips ({split})", unit="clip", disable=count < 256) as bar:
        for start in range(0, count, _BATCH):
            numbers = range(start, min(start + _BATCH, count))
            yield from draw_clips(config, [plan_clip(config, split, i) for i in numbers])
            bar.update(len(numbers))


def features(config: SyntheticConfig) -> dict[str, tfds.features.FeatureConnector]:
    """The schema: pixels and mask as bytes, sound at 16 kHz, boxes as left, top, right, bottom in pixels.

    `face_points` are where `data.face_crop` cuts the first frame's face.
    """
    frames, size = config.num_frames, config.size
    samples = int(frames / config.fps * SAMPLE_RATE)
    packed = tfds.features.Encoding.ZLIB
    return {
        "video": tfds.features.Tensor(shape=(frames, size, size, 3), dtype=np.uint8, encoding=packed),
        "lips": tfds.features.Tensor(shape=(frames, size, size), dtype=np.uint8, encoding=packed),
        "sound": tfds.features.Tensor(shape=(samples,), dtype=np.int16, encoding=packed),
        "opening": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "rounding": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "face_box": tfds.features.Tensor(shape=(frames, 4), dtype=np.float32),
        "face_points": tfds.features.Tensor(shape=(5, 2), dtype=np.float32),
        "face_motion": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "body_motion": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "prompt": tfds.features.Text(),
    }


def prepare(config: SyntheticConfig, directory: str | Path) -> Path:
    """Writes the dataset below a directory, unless it is there.

    Returns:
        The folder of its records.

    Raises:
        ConfigError: Another dataset lies there, made with other settings.
    """
    counts = {"train": config.train_clips, "test": config.test_clips}
    splits = {split: records(config, split, count) for split, count in counts.items()}
    return write_dataset(
        "synthetic_talking_heads", directory, partial(features, config), splits, asdict(config)
    )


def write_example(config: SyntheticConfig, index: int, folder: Path) -> None:
    """Writes a clip that was held out as a portrait, a sound, and the video that it is in truth."""
    (clip,) = draw_clips(config, [plan_clip(config, "test", index)])
    media.check_writable(folder / "portrait.png")
    Image.fromarray(clip["video"][0]).save(folder / "portrait.png")
    media.write_sound(folder / "speech.wav", clip["sound"], SAMPLE_RATE)
    media.write_video(folder / "clip.mp4", clip["video"], config.fps, sound=folder / "speech.wav")


def main(argv: list[str] | None = None) -> None:
    """Writes a dataset from the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.data.synthetic",
        description="Writes synthetic talking heads as a TFDS dataset of array records.",
        epilog=EXAMPLES,
    )
    cli.add_config_argument(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write it")
    parser.add_argument(
        "--example",
        type=int,
        metavar="N",
        help="write instead what can be sampled from: portrait, speech and clip number N of those held out",
    )
    arguments, config = cli.parse(parser, argv)
    settings = build(SyntheticConfig, config.data, "data")
    if arguments.example is not None:
        write_example(settings, arguments.example, Path(arguments.output))
        print(f"Wrote {arguments.output}: portrait.png, speech.wav and clip.mp4")
        return
    folder = prepare(settings, arguments.output)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.data.synthetic")
