"""Smoothing of facial landmarks over time by One-Euro filters.

Source: Casiez et al. (2012), "1 Euro filter: a simple speed-based low-pass filter for noisy input in
interactive systems"; groups and thresholds are those of fantasy-portrait, `diffsynth/models/camer.py`,
`Smoother222`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fantasy_jax.preprocessing.landmarks import DetectedFace, FaceLayout
from fantasy_jax.typing import Float

_FAST = 0.02
"""Mean motion between frames, in sizes of the face, from which a group is smoothed least."""
_MIN_CUTOFF = _DERIVATIVE_CUTOFF = 1.0


@dataclass(frozen=True)
class SmoothingGroup:
    """Landmarks that are smoothed equally strongly.

    The strength is both the time step and the speed coefficient of the filter. It depends on the mean motion
    of the group: it is 0 without motion, `slow` at `still`, `fast` from 0.02 on, and linear in between.

    Attributes:
        points: Indices of the landmarks.
        measured: Indices of those whose motion is measured; None: the same.
        still: Motion up to which the face counts as still, in sizes of the face.
        slow: Strength at that motion.
        fast: Strength of fast motion.
    """

    points: Sequence[int]
    measured: Sequence[int] | None = None
    still: float = 0.003
    slow: float = 0.03
    fast: float = 0.7

    def strength(self, motion: Float[np.ndarray, " P"]) -> float:
        """Returns the strength, given the motion of all landmarks in sizes of the face."""
        mean = float(motion[self.points if self.measured is None else self.measured].mean())
        if mean < self.still:
            return self.slow * (mean / self.still)
        fraction = min((mean - self.still) / (_FAST - self.still), 1.0)
        return self.slow + (self.fast - self.slow) * fraction


OFFICIAL_GROUPS = (
    SmoothingGroup(list(range(33)), list(range(9, 24)), still=0.005, slow=0.05, fast=0.3),
    SmoothingGroup(list(range(33, 48))),
    SmoothingGroup(list(range(48, 74)), slow=0.02, fast=0.5),
    SmoothingGroup(list(range(74, 96))),
    SmoothingGroup(list(range(96, 118))),
    SmoothingGroup(list(range(118, 182)), slow=0.05),
    SmoothingGroup(list(range(182, 202))),
    SmoothingGroup(list(range(202, 222))),
)
"""Outline, nose, brows, eyes, mouth and pupils of the official 222 landmarks."""

FIVE_POINT_GROUPS = (
    SmoothingGroup([0]),
    SmoothingGroup([1]),
    SmoothingGroup([2]),
    SmoothingGroup([3, 4], slow=0.05),
)
"""The same settings for `landmarks.five_points`: each eye as a pupil, nose, mouth."""


def smooth_landmarks(
    points: Float[np.ndarray, "T P 2"],
    sizes: Float[np.ndarray, " T"],
    groups: Sequence[SmoothingGroup],
) -> Float[np.ndarray, "T P 2"]:
    """Smooths the landmarks of one face over time.

    The filter runs over all frames without starting over; the official tracker starts it over whenever a
    fresh detection is larger than the smoothed face, which is a matter of chance.

    Args:
        points: x and y in pixels.
        sizes: Size of the face in pixels by which the motion that leads to a frame is divided.
        groups: Groups without common landmarks; landmarks of no group are not smoothed.

    Returns:
        x and y in pixels, float64; the first frame is unchanged.
    """
    smoothed = np.array(points, np.float64)
    speeds = np.zeros(smoothed.shape[1:])
    for previous, current, size in zip(smoothed, smoothed[1:], sizes[1:], strict=False):
        motion = np.sqrt(np.square(current - previous).sum(axis=-1)) / size
        for group in groups:
            own, strength = list(group.points), group.strength(motion)
            current[own], speeds[own] = _one_euro(current[own], previous[own], speeds[own], strength)
    return smoothed


def _one_euro(
    value: Float[np.ndarray, "P 2"],
    previous: Float[np.ndarray, "P 2"],
    speed: Float[np.ndarray, "P 2"],
    strength: float,
) -> tuple[Float[np.ndarray, "P 2"], Float[np.ndarray, "P 2"]]:
    """Takes a step of the filter and returns the new smoothed value and speed."""
    if strength == 0:  # the limit; the official code divides by zero here, and all later frames are NaN
        return previous, speed
    weight = _weight(strength, _DERIVATIVE_CUTOFF)
    speed = weight * ((value - previous) / strength) + (1 - weight) * speed
    weight = _weight(strength, _MIN_CUTOFF + strength * np.abs(speed))
    return weight * value + (1 - weight) * previous, speed


def _weight(step: float, cutoff: float | Float[np.ndarray, "P 2"]) -> float | Float[np.ndarray, "P 2"]:
    """Returns the weight of the new value in exponential smoothing."""
    rate = 2 * math.pi * cutoff * step
    return rate / (rate + 1)


def face_size(face: DetectedFace, layout: FaceLayout) -> float:
    """Returns the size of a face by which its motion is measured, in pixels.

    It is the width between the ends of the outline, enlarged for turned faces, whose landmarks are less
    accurate: by `1 + (|pitch| + 0.6 |yaw|) / 18` with angles in degrees (`head_angles`). Source:
    fantasy-portrait, `diffsynth/models/camer.py`.
    """
    right, left = (face.points[i] for i in layout.outline_ends)
    pitch, yaw = head_angles(face, layout)
    width = float(np.linalg.norm(left[:2] - right[:2]))
    return max(width, 1.0) * (1 + (abs(pitch) + 0.6 * abs(yaw)) / 18)


def head_angles(face: DetectedFace, layout: FaceLayout) -> tuple[float, float]:
    """Returns pitch and yaw in degrees.

    Where the detector does not estimate them they follow from the depth of its landmarks; the pitch is 0 then
    if the layout has no midline.
    """
    if face.angles is not None:
        return float(face.angles[0]), float(face.angles[1])
    across, down = (
        np.diff(face.points[list(ends)], axis=0)[0] if ends else np.zeros(3)
        for ends in (layout.outline_ends, layout.midline)
    )
    pitch, yaw = (
        math.degrees(math.atan2(float(line[2]), float(np.hypot(line[0], line[1])))) for line in (down, across)
    )
    return pitch, yaw
