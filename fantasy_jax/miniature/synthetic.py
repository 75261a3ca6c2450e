"""Synthetic talking heads: short clips of procedural faces with synthetic speech and known mouth movements.

A clip is a function of the config, its split and its index. The dataset is written as TFDS array records:

    .venv/bin/python -m fantasy_jax.miniature.synthetic --config=configs/tiny.py --output=DIR
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from fantasy_jax import cli, media
from fantasy_jax.config import section
from fantasy_jax.data.records import Record, write_dataset
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import check_writable
from fantasy_jax.miniature.acting import FACTORS, Performance, acts
from fantasy_jax.miniature.clips import (
    Split,
    SyntheticClip,
    SyntheticConfig,
    SyntheticGroup,
    check_video,
    plan_clip,
    plan_group,
)
from fantasy_jax.miniature.faces import SyntheticFace, stack_faces
from fantasy_jax.miniature.rendering import face_box, face_points, render_batch
from fantasy_jax.pipelines.output import audio_file
from fantasy_jax.preprocessing.face_crop import points_in_box
from fantasy_jax.typing import Float
from fantasy_jax.video import SAMPLE_RATE, VideoConfig

EXAMPLES = """\
examples:
  write the training and test clips:
  python -m fantasy_jax.miniature.synthetic --config=configs/tiny.py --output=out/data

  write portrait, speech and video of test clip 7:
  python -m fantasy_jax.miniature.synthetic --config=configs/tiny.py --output=out/example --example=7

  write a picture of two people, and two driving videos that act for 2.6 seconds, too:
  python -m fantasy_jax.miniature.synthetic --config=configs/tiny_portrait.py --output=out/example \\
      --example=7 --config.video.num_frames=65
"""

_BATCH_SIZE = 16
_ZLIB = tfds.features.Encoding.ZLIB


def render_clips(video: VideoConfig, clips: list[SyntheticClip]) -> Iterator[Record]:
    """Renders clips and yields one record each, with the schema of `features`.

    Raises:
        ConfigError: Clips of this size cannot be rendered.
    """
    groups = [SyntheticGroup((clip,), (0.0,), clip.prompt) for clip in clips]
    for clip, group in zip(clips, render_groups(video, groups), strict=True):
        boxes, tracked_points = group.pop("face_box")[0], group.pop("face_points")
        yield group | {
            "waveform": np.round(clip.speech.waveform * 32767).astype(np.int16),
            "opening": clip.speech.opening,
            "rounding": clip.speech.rounding,
            "face_box": boxes,
            "face_points": points_in_box(boxes[0]),
            "tracked_points": tracked_points,
            "face_motion": np.full(video.num_frames, clip.face_motion, np.float32),
            "body_motion": np.full(video.num_frames, clip.body_motion, np.float32),
        }


def render_groups(video: VideoConfig, groups: list[SyntheticGroup]) -> Iterator[Record]:
    """Renders clips of equally many people and yields one record each, with the schema of `group_features`.

    Raises:
        ConfigError: Clips of this size cannot be rendered.
    """
    check_video(video)
    ordered = [_from_back_to_front(group) for group in groups]
    faces, performances = (
        jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *stacked)
        for stacked in zip(*[order[:2] for order in ordered], strict=True)
    )
    places = np.stack([places for *_, places in ordered])
    pixels, lips = render_batch(faces, performances, places, size=video.height)
    frames = np.round((pixels + 1) * 127.5).astype(np.uint8)
    masks = np.round(lips * 255).astype(np.uint8)
    for group, group_frames, mask in zip(groups, frames, masks, strict=True):
        yield {"video": group_frames, "lips": mask, "prompt": group.prompt, **_truth(group, video.height)}


def _from_back_to_front(
    group: SyntheticGroup,
) -> tuple[SyntheticFace, Performance, Float[np.ndarray, " P"]]:
    """Faces, performances and places, stacked; people with larger heads are nearer."""
    order = np.argsort([clip.face.size[1] for clip in group.people], kind="stable")
    people = [group.people[i] for i in order]
    performances = jax.tree.map(lambda *curves: np.stack(curves), *[clip.performance for clip in people])
    return (
        stack_faces([clip.face for clip in people]),
        performances,
        np.float32(group.places)[order],
    )


def _truth(group: SyntheticGroup, size: int) -> Record:
    """Where the people are, in pixels, and how they move."""
    middle = np.float32([len(group.people), 1.0])

    def pixels(units: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        return (units + np.resize(middle, units.shape[-1])) * size / 2

    people = list(zip(group.people, group.places, strict=True))
    return {
        "people": len(people),
        "acts": np.stack([acts(clip.performance) for clip, _ in people]),
        "face_box": np.stack([pixels(face_box(x.face, x.performance, place)) for x, place in people]),
        "face_points": np.stack([pixels(face_points(x.face, x.performance, place)) for x, place in people]),
    }


def as_group(record: Record) -> Record:
    """The record of a clip of any number of people with the truth about each, as in `group_features`."""
    if "tracked_points" not in record:
        return record
    return record | {"face_box": record["face_box"][None], "face_points": record["tracked_points"]}


def records(
    config: SyntheticConfig, video: VideoConfig, split: Split, count: int, *, people: int = 1
) -> Iterator[Record]:
    """Yields the first `count` records of a split, with a progress bar from 256 on."""
    with tqdm(total=count, desc=f"Clips ({split})", unit="clip", disable=count < 256) as bar:
        for start in range(0, count, _BATCH_SIZE):
            indices = range(start, min(start + _BATCH_SIZE, count))
            if people == 1:
                yield from render_clips(video, [plan_clip(config, video, split, i) for i in indices])
            else:
                groups = [plan_group(config, video, split, i, people) for i in indices]
                yield from render_groups(video, groups)
            bar.update(len(indices))


def features(video: VideoConfig) -> dict[str, tfds.features.FeatureConnector]:
    """TFDS schema of the record of a clip of one person.

    `waveform` is 16 kHz audio, `opening` and `rounding` describe the mouth that speech makes, per frame,
    `face_box` is left, top, right, bottom of the head in pixels, `face_points` are the points by which
    `preprocessing.face_crop` cuts the face out of the first frame, and `tracked_points` what is called
    `face_points` in clips of several people (`group_features`), as are all other fields; `as_group` converts.
    """
    frames = video.num_frames
    shared = group_features(video, 1)
    points = shared.pop("face_points")
    return shared | {
        "waveform": tfds.features.Tensor(shape=(video.num_samples,), dtype=np.int16, encoding=_ZLIB),
        "opening": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "rounding": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "face_box": tfds.features.Tensor(shape=(frames, 4), dtype=np.float32),
        "face_points": tfds.features.Tensor(shape=(5, 2), dtype=np.float32),
        "tracked_points": points,
        "face_motion": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
        "body_motion": tfds.features.Tensor(shape=(frames,), dtype=np.float32),
    }


def group_features(video: VideoConfig, people: int) -> dict[str, tfds.features.FeatureConnector]:
    """TFDS schema of the record of a clip of N people, listed from left to right.

    `video` and the lip mask `lips` are bytes, `[T, H, N * W]`. `acts` are the factors of motion
    (`acting.FACTORS`) of every person and frame, `face_box` left, top, right, bottom of the head and
    `face_points` the points of `landmarks.five_points`, in pixels.
    """
    frames, height, width = video.num_frames, video.height, video.width * people
    return {
        "video": tfds.features.Tensor(shape=(frames, height, width, 3), dtype=np.uint8, encoding=_ZLIB),
        "lips": tfds.features.Tensor(shape=(frames, height, width), dtype=np.uint8, encoding=_ZLIB),
        "prompt": tfds.features.Text(),
        "people": tfds.features.Scalar(dtype=np.int32),
        "acts": tfds.features.Tensor(shape=(people, frames, len(FACTORS)), dtype=np.float32),
        "face_box": tfds.features.Tensor(shape=(people, frames, 4), dtype=np.float32),
        "face_points": tfds.features.Tensor(shape=(people, frames, 5, 2), dtype=np.float32),
    }


def write_clips(
    config: SyntheticConfig, video: VideoConfig, directory: str | Path, *, people: int = 1
) -> Path:
    """Writes the splits of the clips of one, two or three people below a directory, unless they exist.

    Clips of one and two people have the splits train and test, those of three people test only.

    Returns:
        The folder of the records.

    Raises:
        ConfigError: The folder holds a dataset made with other settings, or clips of this size cannot be
            rendered, or the config has no clips of so many people.
    """
    check_video(video)
    counts = _counts(config, people)
    for name, count in counts.items():
        if not count:
            raise ConfigError(f"data.{name} is 0; clips of {people} people need at least 1")
    splits = {
        name.partition("_")[0]: records(config, video, name.partition("_")[0], count, people=people)
        for name, count in counts.items()
    }
    name = ("synthetic_talking_heads", "synthetic_pairs", "synthetic_trios")[people - 1]
    if config.acting:  # clips of several strengths can be in one folder
        name += f"_acting_{100 * config.acting:.0f}"
    schema = partial(features, video) if people == 1 else partial(group_features, video, people)
    settings = clip_settings(config, people) | {"video": asdict(video)}
    return write_dataset(name, directory, schema, splits, settings)


def clip_settings(config: SyntheticConfig, people: int) -> dict[str, Any]:
    """The settings that decide the clips of so many people."""
    names = ("seed", "acting", "close") if people > 1 else ("seed", "acting")
    return _counts(config, people) | {name: getattr(config, name) for name in names}


def _counts(config: SyntheticConfig, people: int) -> dict[str, int]:
    """Number of clips by the name of its setting, which begins with that of the split."""
    names = (("train_clips", "test_clips"), ("train_pairs", "test_pairs"), ("test_trios",))[people - 1]
    return {name: getattr(config, name) for name in names}


def write_example(config: SyntheticConfig, video: VideoConfig, index: int, folder: Path) -> list[str]:
    """Writes test clip `index` as `portrait.png` (its first frame), `speech.wav` and `clip.mp4`.

    A config with pairs has more: the first frame of that test pair as `pair.png`, and the two test clips that
    follow as `driver_1.mp4` and `driver_2.mp4`, with their speech.

    Returns:
        The names of the files.
    """
    numbers = (1, 2) if config.test_pairs else ()
    names = ["portrait.png", "speech.wav", "clip.mp4"]
    names += [f"driver_{number}.mp4" for number in numbers] + ["pair.png"] * bool(numbers)
    for name in names:
        check_writable(folder / name)
    clip, *drivers = render_clips(
        video, [plan_clip(config, video, "test", index + number) for number in (0, *numbers)]
    )
    Image.fromarray(clip["video"][0]).save(folder / "portrait.png")
    media.write_audio(folder / "speech.wav", clip["waveform"], SAMPLE_RATE)
    media.write_video(folder / "clip.mp4", clip["video"], video.fps, audio=folder / "speech.wav")
    for number, driver in zip(numbers, drivers, strict=True):
        with audio_file(driver["waveform"] / np.float32(32767), SAMPLE_RATE) as sound:
            media.write_video(folder / f"driver_{number}.mp4", driver["video"], video.fps, audio=sound)
    if numbers:
        (pair,) = render_groups(video, [plan_group(config, video, "test", index, 2)])
        Image.fromarray(pair["video"][0]).save(folder / "pair.png")
    return names


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
        help="write an example of test clip N instead of the dataset: portrait, speech and video, and for a "
        "config with pairs a picture of two people and two driving videos",
    )
    arguments, config = cli.parse(parser, argv)
    data = section(SyntheticConfig, config, "data")
    video = section(VideoConfig, config, "video")
    if arguments.example is not None:
        names = write_example(data, video, arguments.example, Path(arguments.output))
        print(f"Wrote {arguments.output}: {', '.join(names)}")
        return
    for people in (1, 2, 3):
        if people == 1 or any(_counts(data, people).values()):
            folder = write_clips(data, video, arguments.output, people=people)
            print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.synthetic")
