"""Motion intensities of faces and bodies in clips, and their normalisation over a dataset.

Source: arXiv 2504.04842, section 3: the variance of facial landmarks and that of body joints, each normalised
to [0, 1]. The paper does not say what coordinates are relative to, nor how they are normalised.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fantasy_jax.files import atomic_write
from fantasy_jax.models.adapters.motion import NEUTRAL
from fantasy_jax.preprocessing.alignment import apply_affine, fit_similarity
from fantasy_jax.preprocessing.landmarks import JOINTS, BodyTrack, FaceTrack

MOTION_FILE = "motion.json"
"""File of a normaliser, beside the records and in the motion adapter's folder of the weight store."""

_COUNTED = [i for i, name in enumerate(JOINTS) if not name.endswith(("_eye", "_ear"))]
"""Joints of the body intensity; the head counts as one joint, not as five."""
_VISIBLE = 0.5


def face_intensity(face: FaceTrack) -> float:
    """Returns the variance of a face's landmarks over the clip, without that of the head's pose.

    The rigid landmarks of every frame are aligned in three dimensions with their mean over the clip; what
    remains is expression, speech and blinks. Depth, which is estimated from one image, takes part in the
    alignment but not in the variance.

    Returns:
        Mean over landmarks, in squares of the distance between the eyes; NaN for fewer than two frames.
    """
    points = face.points[face.present].astype(np.float64)
    if len(points) < 2:
        return float("nan")
    rigid, target = list(face.layout.rigid), points[0]
    for _ in range(2):  # aligned with the first frame, then with the mean
        aligned = apply_affine(fit_similarity(points[:, rigid], target[rigid]), points)
        target = aligned.mean(axis=0)
    eyes = [target[list(eye[:2])].mean(axis=0) for eye in (face.layout.right_eye, face.layout.left_eye)]
    unit = np.linalg.norm(eyes[0] - eyes[1])
    return float((aligned[..., :2] / unit).var(axis=0).sum(axis=-1).mean())


def body_intensity(body: BodyTrack, face: FaceTrack) -> float:
    """Returns the variance of a body's joints over the clip, of joints visible in at least half the frames.

    The position of the body in the image is included, because leaning and swaying are motion; so is the
    motion of the camera.

    Args:
        body: The joints.
        face: Gives the unit of length; shoulders are turned away, occluded and cut off more often.

    Returns:
        Mean over joints, in squares of the face's longer side; NaN if no joint is visible.
    """
    found = (body.visibility > 0).any(axis=1)
    visible = (body.visibility[found] > _VISIBLE)[:, _COUNTED]
    joints = np.where(visible[..., None], body.joints[found][:, _COUNTED].astype(np.float64), np.nan)
    joints = joints[:, visible.sum(axis=0) >= max(len(visible) / 2, 2)]
    if not joints.size:
        return float("nan")
    return float(np.nanvar(joints / face.size, axis=0).sum(axis=-1).mean())


@dataclass(frozen=True)
class MotionNormaliser:
    """Piecewise linear map of the intensities of face and body to [0, 1]; the dataset's median becomes 0.5.

    Attributes:
        low: Intensities of face and body that map to 0.
        middle: Intensities that map to 0.5.
        high: Intensities that map to 1.
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
        """Fits the normaliser to the clips of a dataset.

        Args:
            intensities: Of face and body of every clip; NaN where unknown.
            percentiles: Those that map to 0, 0.5 and 1. The extremes are not used, because they are errors of
                the detector and would compress all other values; the median is, because variances are skewed.

        Raises:
            ValueError: No clip has a face intensity, or none has a body intensity.
        """
        values = np.array(intensities, np.float64).reshape(-1, 2)
        if np.isnan(values).all(axis=0).any():
            raise ValueError("no clip has a face intensity, or none has a body intensity")
        return cls(*(tuple(row.tolist()) for row in np.nanpercentile(values, percentiles, axis=0)))

    def __call__(self, intensities: tuple[float, float]) -> tuple[float, float]:
        """Normalises the intensities of face and body, clipped to [0, 1]; unknown ones become neutral."""
        face, body = (
            float(np.interp(value, (low, middle, high), (0, NEUTRAL, 1)))
            if low < high and not np.isnan(value)
            else NEUTRAL
            for value, low, middle, high in zip(intensities, self.low, self.middle, self.high, strict=True)
        )
        return face, body

    def save(self, path: Path) -> None:
        """Writes the normaliser as JSON."""
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "MotionNormaliser":
        """Reads a normaliser that `save` wrote."""
        return cls(**{name: tuple(values) for name, values in json.loads(path.read_text()).items()})
