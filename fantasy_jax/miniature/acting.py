"""The motion of procedural faces: speech, motion of head and body, emotions and gaze."""

from dataclasses import dataclass, fields, replace

import jax
import numpy as np

from fantasy_jax.miniature.voices import Speech
from fantasy_jax.typing import Float, Leaf
from fantasy_jax.video import VideoConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Performance:
    """Motion of a face, one value per video frame (`[T]`).

    Left and right are those of the image. A unit of an expression is its full strength.

    Attributes:
        opening: Opening of the mouth, from 0; 1 is the widest opening of speech in a usual clip.
        rounding: Rounding of the lips, from 0 to 1.
        blink: Closing of the lids, from 0 (open) to 1 (shut).
        shift_x: Horizontal shift of the head.
        shift_y: Vertical shift of the head.
        roll: In-plane rotation of the head in radians.
        turn: Rotation to the side, as a shift of the features in units of the head.
        nod: Rotation up and down, as a shift of the features in units of the head.
        body: Horizontal shift of the shoulders.
        gaze_x: Gaze to the left (-1) or right (1).
        gaze_y: Gaze up (-1) or down (1).
        lid: Lids narrowed (-1) or wide open (1).
        brow_inner: Inner ends of the brows lowered (-1) or raised (1).
        brow_outer: Outer ends of the brows lowered (-1) or raised (1).
        furrow: Brows drawn together, from 0 to 1.
        smile: Corners of the mouth down (-1) or up (1).
        asymmetry: Left (-1) or right (1) corner of the mouth higher than the other.
        sneer: Raised upper lip and wrinkled nose, from 0 to 1.
        jaw: Lower jaw to the left (-1) or right (1).
    """

    opening: Leaf
    rounding: Leaf
    blink: Leaf
    shift_x: Leaf
    shift_y: Leaf
    roll: Leaf
    turn: Leaf
    nod: Leaf
    body: Leaf
    gaze_x: Leaf
    gaze_y: Leaf
    lid: Leaf
    brow_inner: Leaf
    brow_outer: Leaf
    furrow: Leaf
    smile: Leaf
    asymmetry: Leaf
    sneer: Leaf
    jaw: Leaf


FACTORS = tuple(field.name for field in fields(Performance))
"""Names of the factors of motion, in the order of a record's `acts`."""

EXPRESSIONS = ("lid", "brow_inner", "brow_outer", "furrow", "smile", "asymmetry", "sneer", "jaw")
"""The factors that emotions consist of."""

EMOTIONS: dict[str, dict[str, float]] = {
    "neutral": {},
    "happy": {"smile": 1.0, "lid": -0.3, "brow_inner": 0.15, "brow_outer": 0.3},
    "sad": {"smile": -0.8, "lid": -0.55, "brow_inner": 1.0, "brow_outer": -0.7},
    "angry": {"smile": -0.55, "lid": -0.25, "brow_inner": -1.0, "brow_outer": 0.3, "furrow": 1.0},
    "surprised": {"lid": 1.0, "brow_inner": 1.0, "brow_outer": 1.0},
    "disgusted": {
        "smile": -0.6,
        "lid": -0.6,
        "brow_inner": -0.5,
        "brow_outer": -0.4,
        "furrow": 0.4,
        "asymmetry": 0.35,
        "sneer": 1.0,
    },
    "fearful": {"smile": -0.45, "lid": 0.85, "brow_inner": 1.1, "brow_outer": -0.1, "furrow": 0.7},
}
"""Emotions as mixtures of expressions at full intensity; speech alone opens and rounds the mouth."""

_LIMITS = {"furrow": (0.0, 1.2), "sneer": (0.0, 1.2), "turn": (-0.3, 0.3), "nod": (-0.2, 0.2)}
_USUAL_LIMITS = (-1.2, 1.2)


def acts(performance: Performance) -> Float[np.ndarray, "T K"]:
    """The factors of every frame, in the order of `FACTORS`."""
    return np.stack([getattr(performance, name) for name in FACTORS], axis=-1).astype(np.float32)


def draw_performance(
    rng: np.random.Generator, video: VideoConfig, speech: Speech, face_motion: float, body_motion: float
) -> Performance:
    """Draws the motion of a person who talks without expression and looks at the camera."""
    seconds = np.arange(video.num_frames) / video.fps

    def sway(amplitude: float, hertz: tuple[float, float] = (0.4, 1.6)) -> Float[np.ndarray, " T"]:
        """A slow wave that starts at 0, the pose of the first frame."""
        wave = np.sin(2 * np.pi * (rng.uniform(*hertz) * seconds + rng.uniform()))
        return (amplitude * (wave - wave[0])).astype(np.float32)

    stress = np.convolve(np.pad(speech.opening, 4), np.hanning(9) / np.hanning(9).sum(), mode="valid")
    nod = 0.07 * body_motion * (stress - stress[0])  # nod on stressed syllables
    still = np.zeros(video.num_frames, np.float32)
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
        **dict.fromkeys(("gaze_x", "gaze_y", *EXPRESSIONS), still),
    )


def _draw_blink(
    rng: np.random.Generator, seconds: Float[np.ndarray, " T"], intensity: float
) -> Float[np.ndarray, " T"]:
    """At most one blink, of about a tenth of a second; its probability grows with the intensity of motion."""
    draw, moment = rng.uniform((0, 0.1), (1, seconds[-1]))
    blinks = draw < 0.15 + 0.45 * intensity
    return (blinks * np.exp(-(((seconds - moment) / 0.055) ** 2))).astype(np.float32)


@dataclass(frozen=True)
class Acting:
    """Emotions, gaze and motion of the head, added to a performance.

    Attributes:
        emotions: One or two names of `EMOTIONS`; the first is the stronger one.
        added: Curves `[T]` by the name of their factor.
    """

    emotions: tuple[str, ...]
    added: dict[str, Float[np.ndarray, " T"]]

    def apply(self, performance: Performance, strength: float) -> Performance:
        """Returns the performance with `strength` times the curves added, within the limits of a face."""
        changed = {}
        for name, curve in self.added.items():
            value = _limited(name, getattr(performance, name) + strength * curve)
            changed[name] = value.astype(np.float32)
        return replace(performance, **changed)


def _limited(name: str, value: Leaf) -> Leaf:
    return np.clip(value, *_LIMITS.get(name, _USUAL_LIMITS))


def draw_acting(rng: np.random.Generator, video: VideoConfig) -> Acting:
    """Draws emotions of changing intensity, independent small motions, saccades, and turns and nods."""
    seconds = np.arange(video.num_frames) / video.fps

    def slow() -> Float[np.ndarray, " T"]:
        """A wave of 0.3 to 1 Hz with a deviation of 1 over all phases."""
        return np.sqrt(2) * np.sin(2 * np.pi * (rng.uniform(0.3, 1.0) * seconds + rng.uniform()))

    count = 1 + rng.integers(2)
    names = tuple(str(name) for name in rng.choice(list(EMOTIONS), count, replace=False))
    added = {name: 0.12 * slow() for name in EXPRESSIONS}
    for name, strongest in zip(names, (1.0, 0.45), strict=False):
        intensity = strongest * np.clip(0.6 + 0.35 * slow(), 0, 1)
        for factor, value in EMOTIONS[name].items():
            added[factor] = added[factor] + intensity * value
    added["asymmetry"] = added["asymmetry"] + 0.35 * rng.normal()
    added["jaw"] = added["jaw"] + 0.35 * rng.normal()
    added["gaze_x"], added["gaze_y"] = _saccades(rng, seconds, 0.5), _saccades(rng, seconds, 0.4)
    for name, still, moving in (("turn", 0.06, 0.07), ("nod", 0.04, 0.05), ("roll", 0.04, 0.03)):
        added[name] = still * rng.normal() + moving * slow()
    return Acting(names, added)


def draw_still(rng: np.random.Generator) -> Performance:
    """Draws the motion of one frame: poses, gaze and mouths of speech, and more expressions than people act.

    Expressions vary independently around emotions, so that each can be told from the others.
    """
    values = {name: 0.35 * rng.normal() for name in EXPRESSIONS}
    for name, strongest in zip(rng.choice(list(EMOTIONS), 2, replace=False), (1.0, 0.6), strict=True):
        intensity = strongest * rng.uniform()
        for factor, value in EMOTIONS[name].items():
            values[factor] += intensity * value
    values |= {"gaze_x": rng.uniform(-1, 1), "gaze_y": rng.uniform(-1, 1)}
    values |= {"turn": 0.12 * rng.normal(), "nod": 0.08 * rng.normal(), "roll": 0.07 * rng.normal()}
    values |= {"shift_x": 0.03 * rng.normal(), "shift_y": 0.03 * rng.normal()}
    closed, plain, open_eyed = rng.uniform(size=3) < (0.25, 0.4, 0.7)
    values["opening"] = 0.0 if closed else rng.uniform(0, 1.1)
    values["rounding"] = 0.0 if plain else rng.uniform()
    values["blink"] = 0.0 if open_eyed else rng.uniform()
    return hold(1, **{name: _limited(name, value) for name, value in values.items()})


def _saccades(
    rng: np.random.Generator, seconds: Float[np.ndarray, " T"], deviation: float
) -> Float[np.ndarray, " T"]:
    """A gaze that rests for 0.2 to 0.8 seconds and then jumps, within 40 to 120 milliseconds."""
    moments, targets = [0.0], [rng.normal(0, deviation)]
    moment: float = rng.uniform(0, 0.8)
    while moment < seconds[-1]:
        moments += [moment, moment + rng.uniform(0.04, 0.12)]
        targets += [targets[-1], rng.normal(0, deviation)]
        moment = moments[-1] + rng.uniform(0.2, 0.8)
    return np.clip(np.interp(seconds, moments, targets), -1, 1)


def hold(num_frames: int, **factors: float) -> Performance:
    """A performance that holds one expression and pose; factors that are not given are 0."""
    return Performance(**{name: np.full(num_frames, factors.get(name, 0.0), np.float32) for name in FACTORS})
