"""The miniature's face detector: a small convolutional network that finds synthetic faces.

Detectors of photographed faces need packages and files of their own. This one is trained with the miniature,
and is part of its weights. Like CenterNet (arXiv 1904.07850), it finds people at the peaks of a heat map, and
reads box and points at the same places.
"""

from dataclasses import dataclass
from typing import ClassVar

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import Depth, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.convolution import convolve
from fantasy_jax.miniature.vae import to_blocks
from fantasy_jax.models.layers import run
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.preprocessing.landmarks import DetectedFace, FaceLayout
from fantasy_jax.preprocessing.official_detectors import suppress_overlaps
from fantasy_jax.typing import Array, DType, Float, UInt8

CELL = 8
"""Side of a cell of the heat map, in pixels of the network's input."""
_PATCH = 4
_POINTS = 7
_MIN_CONFIDENCE = 0.5

SYNTHETIC_FACE = FaceLayout(
    outer_lips=(),
    inner_lips=(),
    right_eye=(),
    left_eye=(),
    nose_tip=2,
    mouth_corners=(3, 4),
    lip_middles=None,
    rigid=(),
    outline_ends=(5, 6),
    eye_centers=(0, 1),
)
"""The points of `landmarks.five_points`, and the middles of the left and of the right side of the head."""


@dataclass(frozen=True)
class FaceDetectorConfig(Settings):
    """Sizes of the network.

    Attributes:
        image_size: Height of its input, in pixels.
        stem: Channels of patches of 4 x 4 pixels.
        width: Channels of cells of 8 x 8 pixels.
        depth: Convolutions of cells; each lets a cell see one more cell on all sides.
    """

    image_size: Width = 64
    stem: Width = 32
    width: Width = 48
    depth: Depth = 3

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % CELL:
            raise ConfigError(f"image_size is {self.image_size}; it must be a multiple of {CELL}")


class MiniatureFaceDetector(nnx.Module):
    """Finds faces (a `landmarks.FaceDetector`).

    Attributes:
        layout: Indices of the landmarks.
        config: Sizes.
    """

    layout: ClassVar[FaceLayout] = SYNTHETIC_FACE

    def __init__(
        self,
        config: FaceDetectorConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the network."""
        self.config = config
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}

        def conv(inputs: int, outputs: int) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (1, 3, 3), conv_general_dilated=convolve, **types)

        self.stem = conv(3 * _PATCH**2, config.stem)
        self.shrink = nnx.Linear(config.stem * (CELL // _PATCH) ** 2, config.width, **types)
        self.blocks = nnx.List(conv(config.width, config.width) for _ in range(config.depth))
        self.head = nnx.Linear(config.width, 1 + 2 * _POINTS, **types)

    def __call__(
        self, pixels: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B h w"], Float[Array, "B h w 7 2"]]:
        """Runs the network.

        Args:
            pixels: RGB in [-1, 1]; sides are multiples of 8.

        Returns:
            For each cell, the logit of its confidence that it is near the centre of a head, and seven points
            of this head: upper left and lower right corner of its box, and those of `landmarks.five_points`.
            x and y are in heights of the image.
        """
        x = nnx.silu(self.stem(to_blocks(pixels[:, None], 1, _PATCH)))
        x = self.shrink(to_blocks(x, 1, CELL // _PATCH))
        for block in self.blocks:
            x = x + block(nnx.silu(x))
        heat, points = jnp.split(self.head(nnx.silu(x))[:, 0], [1], axis=-1)
        points = points.reshape(*points.shape[:-1], _POINTS, 2)
        return heat[..., 0], points + cell_centres(*heat.shape[1:3])[:, :, None]

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[DetectedFace]:
        """Returns all faces of an RGB image, the largest first."""
        fitted = fit_height(image, self.config.image_size)
        heat, points = (np.asarray(x[0]) for x in run(self, from_uint8(fitted[None])))
        confidence = np.asarray(jax.nn.sigmoid(heat))
        certain = confidence > _MIN_CONFIDENCE
        found = [_around(confidence, points, row, column) for row, column in np.argwhere(certain).tolist()]
        found = np.array(found, np.float32).reshape(-1, _POINTS, 2) * np.float32(len(image))
        boxes, scores = found[:, :2].reshape(-1, 4), confidence[certain]
        faces = [_face(found[i], float(scores[i])) for i in suppress_overlaps(boxes, scores)]
        return sorted(faces, key=lambda face: -float((face.box[2:] - face.box[:2]).max()))


def cell_centres(rows: int, columns: int) -> Float[np.ndarray, "{rows} {columns} 2"]:
    """Centres of the heat map's cells, x and y in heights of the image."""
    y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
    return np.stack([x, y], axis=-1).astype(np.float32) / rows


def fit_height(image: UInt8[np.ndarray, "H W 3"], height: int) -> UInt8[np.ndarray, "{height} _ 3"]:
    """Resizes an image; the width is filled up to whole cells by the last column."""
    width = max(round(image.shape[1] * height / image.shape[0]), 1)
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_LINEAR
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    return np.pad(resized, ((0, 0), (0, -width % CELL), (0, 0)), mode="edge")


def _around(
    confidence: Float[np.ndarray, "h w"], points: Float[np.ndarray, "h w 7 2"], row: int, column: int
) -> Float[np.ndarray, "7 2"]:
    """Mean of the points of a cell and its neighbours, by their confidence."""
    near = np.s_[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    weights = confidence[near][..., None, None]
    return (weights * points[near]).sum(axis=(0, 1)) / weights.sum()


def _face(points: Float[np.ndarray, "7 2"], confidence: float) -> DetectedFace:
    left, top, right, bottom = box = points[:2].reshape(4)
    middle = (top + bottom) / 2
    landmarks = np.concatenate([points[2:], [[left, middle], [right, middle]]])
    landmarks = np.pad(landmarks, ((0, 0), (0, 1)))  # of unknown depth
    return DetectedFace(landmarks.astype(np.float32), confidence, box.astype(np.float32))
