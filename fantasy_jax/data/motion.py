"""How much a face and a body move in a clip, and what is usual in a data set.

Source: arXiv 2504.04842, section 3: the variance of facial landmarks and that of body joints, each normalised
to [0, 1]. What the coordinates are relative to, and how they are normalised, the paper does not say.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fantasy_jax.data.landmarks import JOINTS, BodyTrack, FaceTrack
from fantasy_jax.media import whole_or_nothing
from fantasy_jax.models.adapters.motion import NEUTRAL
from fantasy_jax.typing import Float

MOTION_FILE = "motion.json"
"""What a normaliser is stored as, beside the records and with the motion adapter's weights."""

_COUNTED = [i for i, name in enumerate(JOINTS) if not name.endswith(("_eye", "_ear"))]
"""Joints of the body; a head is one joint of it, not five."""
_VISIBLE = 0.5


def face_intensity(face: FaceTrack) -> float:
    """Variance of a face's landmarks over the clip, the head's pose taken out; NaN in less than two frames.

    Every frame's landmarks are moved, turned and scaled in three dimensions so that those which hardly move
    with the face lie on their mean over the clip. What is left is expression, speech and blinks. Depth, which
    is guessed from one picture, takes part in the turning and not in the variance.

    Returns:
        Mean over landmarks, in squares of the distance between the eyes, which size cannot change.
    """
    points = face.points[face.present].astype(np.float64)
    if len(points) < 2:
        return float("nan")
    rigid, target = list(face.layout.rigid), points[0]
    for _ in range(2):  # onto the first frame, then onto the mean
        aligned = _align(points, target, rigid)
        target = aligned.mean(axis=0)
    eyes = [target[list(eye[:2])].mean(axis=0) for eye in (face.layout.right_eye, face.layout.left_eye)]
    unit = np.linalg.norm(eyes[0] - eyes[1])
    return float((aligned[..., :2] / unit).var(axis=0).sum(axis=-1).mean())


def body_intensity(body: BodyTrack, face: FaceTrack) -> float:
    """Variance of a body's joints over the clip, those that are seen in half of the frames; NaN without any.

    Where the body is in the picture stays in, for to lean and to sway is motion; so does a moving camera.

    Args:
        body: Its joints.
        face: Whose size is the unit: shoulders are turned away, hidden and cut off more often.

    Returns:
        Mean over joints, in squares of the face's longer side.
    """
    found = (body.visibility > 0).any(axis=1)
    seen = (body.visibility[found] > _VISIBLE)[:, _COUNTED]
    joints = np.where(seen[..., None], body.joints[found][:, _COUNTED].astype(np.float64), np.nan)
    joints = joints[:, seen.sum(axis=0) >= max(len(seen) / 2, 2)]
    if not joints.size:
        return float("nan")
    return float(np.nanvar(joints / face.size, axis=0).sum(axis=-1).mean())


@dataclass(frozen=True)
class MotionNormaliser:
    """Intensities of face and body to [0, 1]: what is usual in a data set is 0.5, and the rest around it.

    Attributes:
        low: Intensities that become 0, of face and body.
        middle: Those that become 0.5.
        high: Those that become 1.
    """

    low: tuple[float, float]
    middle: tuple[float, float]
    high: tuple[float, float]

    @classmethod
    def fit(
        cls,
        intensities: Sequence[tuple[float, float]],
        percentiles: tuple[float, float, float] = (5.0, 50.0, 95.0),
    ) -> "MotionNormaliser":
        """Fits to the clips of a data set.

        Args:
            intensities: Of face and body, of every clip; NaN where unknown.
            percentiles: What becomes 0, 0.5 and 1. Not the extremes, which are mistakes of the detector and
                would press all others together; the median in the middle, for variances are skewed and 0.5 is
                to mean the usual.

        Raises:
            ValueError: No clip has an intensity of its face, or of its body.
        """
        values = np.array(intensities, np.float64).reshape(-1, 2)
        if np.isnan(values).all(axis=0).any():
            raise ValueError("no clip has an intensity of its face, or none of its body")
        return cls(*(tuple(row.tolist()) for row in np.nanpercentile(values, percentiles, axis=0)))

    def __call__(self, intensities: tuple[float, float]) -> tuple[float, float]:
        """Of face and body, cut off at 0 and 1; what is unknown is usual."""
        face, body = (
            float(np.interp(value, (low, middle, high), (0, NEUTRAL, 1)))
            if low < high and not np.isnan(value)
            else NEUTRAL
            for value, low, middle, high in zip(intensities, self.low, self.middle, self.high, strict=True)
        )
        return face, body

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        with whole_or_nothing(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "MotionNormaliser":
        """Reads it back."""
        return cls(**{name: tuple(values) for name, values in json.loads(path.read_text()).items()})


def _align(
    points: Float[np.ndarray, "T P 3"], target: Float[np.ndarray, "P 3"], rigid: list[int]
) -> Float[np.ndarray, "T P 3"]:
    """Each frame by the similarity that brings its rigid points nearest to the target's (Umeyama, 1991)."""
    middles, middle = points[:, rigid].mean(axis=1, keepdims=True), target[rigid].mean(axis=0)
    source, wanted = points[:, rigid] - middles, target[rigid] - middle
    left, sizes, right = np.linalg.svd(np.einsum("pi,tpj->tij", wanted, source))
    sizes[:, 2] *= (mirrored := np.sign(np.linalg.det(left @ right)))
    left[..., 2] *= mirrored[:, None]
    scale = sizes.sum(axis=1) / np.square(source).sum(axis=(1, 2))
    return scale[:, None, None] * (points - middles) @ (left @ right).transpose(0, 2, 1) + middle
