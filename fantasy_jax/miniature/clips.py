"""Plans of synthetic clips: who is seen, how they move, and what they say.

A clip is a function of the config, its split and its index; `synthetic` renders and writes clips.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fantasy_jax.config import Fraction, NonNegativeInt, PositiveInt, Seed, Settings
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.acting import Performance, draw_acting, draw_performance
from fantasy_jax.miniature.faces import SyntheticFace, acting_face, draw_face, in_one_place
from fantasy_jax.miniature.voices import Speech, draw_voice, speak
from fantasy_jax.video import VideoConfig

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

_NUMBERS = {2: "Two", 3: "Three"}
_WHERE = {2: ("left", "right"), 3: ("left", "middle", "right")}
_SEEDS = {"train": 0, "test": 1, "unseen": 2}


@dataclass(frozen=True)
class SyntheticConfig(Settings):
    """A synthetic dataset; `VideoConfig` gives size, length and frame rate of its clips.

    Attributes:
        train_clips: Number of training clips.
        test_clips: Number of held-out clips, with other faces, voices and words.
        seed: Seed of all random draws.
        acting: Strength of emotions, gaze, turns and nods, from 0 (none) to 1. A clip is otherwise the same.
        train_pairs: Number of training clips of two people.
        test_pairs: Number of held-out clips of two people.
        test_trios: Number of held-out clips of three people.
        close: Fraction of the clips of several people where they stand closer together than in a square each.
    """

    train_clips: PositiveInt = 4096
    test_clips: PositiveInt = 64
    seed: Seed = 0
    acting: Fraction = 0.0
    train_pairs: NonNegativeInt = 0
    test_pairs: NonNegativeInt = 0
    test_trios: NonNegativeInt = 0
    close: Fraction = 0.5


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
        emotions: The emotions that are acted, the strongest first; none without acting.
    """

    face: SyntheticFace
    performance: Performance
    speech: Speech
    prompt: str
    face_motion: float
    body_motion: float
    emotions: tuple[str, ...] = ()


@dataclass(frozen=True)
class SyntheticGroup:
    """Several people on one canvas, before rendering.

    Attributes:
        people: The people from left to right, in the light of the first.
        places: Horizontal centres of their squares; a unit is half the height, 0 the middle of the canvas.
        prompt: The prompt.
    """

    people: tuple[SyntheticClip, ...]
    places: tuple[float, ...]
    prompt: str


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
    return _draw_clip(
        rng, config, video, unseen=split == "unseen", face_motion=face_motion, body_motion=body_motion
    )


def _draw_clip(
    rng: np.random.Generator,
    config: SyntheticConfig,
    video: VideoConfig,
    *,
    unseen: bool,
    face_motion: float | None = None,
    body_motion: float | None = None,
) -> SyntheticClip:
    (acting_rng,) = rng.spawn(1)  # other draws are the same with and without acting
    face = draw_face(rng, unseen=unseen)
    speech = speak(rng, draw_voice(rng), num_frames=video.num_frames, fps=video.fps)
    manner = ("calm", "lively")[rng.integers(2)]
    prompt = PROMPTS[manner][rng.integers(len(PROMPTS[manner]))]
    low, high = (0.0, 0.3) if manner == "calm" else (0.6, 1.0)
    drawn = rng.uniform((0, low), (1, high)).tolist()
    face_motion = drawn[0] if face_motion is None else face_motion
    body_motion = drawn[1] if body_motion is None else body_motion
    performance = draw_performance(rng, video, speech, face_motion, body_motion)
    clip = SyntheticClip(face, performance, speech, prompt, face_motion, body_motion)
    return _act(acting_rng, clip, video, config.acting) if config.acting else clip


def _act(rng: np.random.Generator, clip: SyntheticClip, video: VideoConfig, strength: float) -> SyntheticClip:
    """Adds acting to a clip; half of the prompts name the stronger emotion."""
    acting = draw_acting(rng, video)
    named = f"{clip.prompt} The person looks {acting.emotions[0]}."
    return replace(
        clip,
        face=acting_face(clip.face),
        performance=acting.apply(clip.performance, strength),
        prompt=named if rng.uniform() < 0.5 else clip.prompt,
        emotions=acting.emotions,
    )


def plan_group(
    config: SyntheticConfig, video: VideoConfig, split: Split, index: int, people: int
) -> SyntheticGroup:
    """Draws everything that decides a clip of several people.

    Args:
        config: The dataset; its seed is used.
        video: Length and frame rate.
        split: Split of the dataset.
        index: Index of the clip among those of this many people.
        people: Number of people, at least 2.
    """
    rng = np.random.default_rng([config.seed, _SEEDS[split], index, people])
    clips = [_draw_clip(each, config, video, unseen=split == "unseen") for each in rng.spawn(people)]
    faces = in_one_place([clip.face for clip in clips])
    clips = [replace(clip, face=face) for clip, face in zip(clips, faces, strict=True)]
    places = draw_places(rng, faces, config.close)
    prompt = f"{_NUMBERS[people]} people are talking."
    if clips[0].emotions and rng.uniform() < 0.5:
        named = zip(_WHERE[people], clips, strict=True)
        prompt += "".join(f" The {where} one looks {clip.emotions[0]}." for where, clip in named)
    return SyntheticGroup(tuple(clips), places, prompt)


def draw_places(rng: np.random.Generator, faces: list[SyntheticFace], close: float) -> tuple[float, ...]:
    """Draws where the squares of several people are on their canvas, as in `SyntheticGroup`.

    Args:
        rng: Random generator.
        faces: The people from left to right.
        close: Probability that they stand closer together than in a square each.
    """
    people = len(faces)
    # Closer together there is room for little more than the heads; shoulders overlap.
    gaps = np.full(people - 1, 2.0)
    if rng.uniform() < close:
        halves, centres = (np.array([getattr(f, name)[0] for f in faces]) for name in ("size", "centre"))
        apart = (halves[1:] + halves[:-1]) * rng.uniform(1.1, 1.4, people - 1)
        gaps = np.minimum(apart + centres[:-1] - centres[1:], 2.0)
    places = np.concatenate([[0.0], np.cumsum(gaps)])
    places = places - places.mean() + rng.uniform(-0.5, 0.5) * (2 * (people - 1) - places[-1])
    return tuple(places.tolist())
