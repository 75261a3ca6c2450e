"""Training of the face detector on rendered pictures of one and of two people, new ones in every step."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import jax.numpy as jnp
import numpy as np
import optax

from fantasy_jax.config import Fraction, PositiveInt
from fantasy_jax.miniature.acting import draw_still
from fantasy_jax.miniature.clips import SyntheticClip, SyntheticGroup, draw_places
from fantasy_jax.miniature.face_detector import CELL, MiniatureFaceDetector, cell_centres, fit_height
from fantasy_jax.miniature.faces import acting_face, draw_face, in_one_place
from fantasy_jax.miniature.stage import EncoderStageConfig
from fantasy_jax.miniature.synthetic import render_groups
from fantasy_jax.miniature.voices import Speech
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, Float32, UInt8
from fantasy_jax.video import VideoConfig

_RENDERED, _VARIED = (5, 0), (5, 2)
"""Parts of the seeds, apart from those of clips and of other trainings, of what is drawn."""
_MIRRORED = [0, 1, 3, 2, 4, 6, 5]
"""Which point is where in the mirror: eyes and corners of the mouth change places."""
_CLOSE, _ACTING = 0.6, 0.75
"""Fraction of the pictures of several people who stand close together, and of faces that are made to act."""
_SPREAD = 0.25
"""Deviation of the heat around the centre of a head, in sides of its box."""
_SILENCE = Speech(*[np.zeros(0, np.float32)] * 3)


@dataclass(frozen=True)
class FaceDetectorStageConfig(EncoderStageConfig):
    """Training of the face detector.

    Attributes:
        num_steps: Training steps.
        batch_size: Pictures of one person per step, and as many of two.
        optimizer: The optimizer.
        variants: Pictures that are made of each rendered one, which takes longer than all else.
        jitter: Standard deviation of the scale of a picture, and twice that of its place, in heights.
        light: Standard deviation of the relative brightness.
        noise: Standard deviation of errors of pixels, as a fraction of their range.
    """

    num_steps: PositiveInt = 2000
    batch_size: PositiveInt = 16
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_steps=50, final_fraction=0.02)
    variants: PositiveInt = 4
    jitter: Fraction = 0.08
    light: Fraction = 0.12
    noise: Fraction = 0.01


def draw_pictures(
    generators: Sequence[np.random.Generator], people: int, size: int, *, unseen: bool = False
) -> tuple[UInt8[np.ndarray, "B {size} W 3"], Float32[np.ndarray, "B {people} 7 2"]]:
    """Draws and renders a picture of people who were never seen for each random generator.

    Args:
        generators: Random generators.
        people: People in each picture.
        size: Height of the pictures in pixels; each person adds as much to the width.
        unseen: Whether faces are from just outside the usual ranges.

    Returns:
        RGB, and the corners of the box and the five points of every person, as of the detector.
    """
    groups = [_draw_group(rng, people, unseen=unseen) for rng in generators]
    rendered = list(render_groups(VideoConfig(size, size), groups))
    truth = [np.concatenate([x["face_box"].reshape(-1, 2, 2), x["face_points"][:, 0]], 1) for x in rendered]
    return np.stack([x["video"][0] for x in rendered]), np.stack(truth) / np.float32(size)


def _draw_group(rng: np.random.Generator, people: int, *, unseen: bool) -> SyntheticGroup:
    faces = [draw_face(rng, unseen=unseen) for _ in range(people)]
    faces = in_one_place([acting_face(face) if rng.uniform() < _ACTING else face for face in faces])
    places = draw_places(rng, faces, _CLOSE) if people > 1 else (0.0,)
    clips = [SyntheticClip(face, draw_still(rng), _SILENCE, "", 0.0, 0.0) for face in faces]
    return SyntheticGroup(tuple(clips), places, "")


def detector_batches(
    size: int,
    image_size: int,
    config: FaceDetectorStageConfig,
    *,
    batch_size: int,
    start: int,
    num_workers: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields batches without end, from batch number `start` on, of pictures of one person and of two.

    Arguments are those of `data.loader.batches`; nothing is read, and rendering takes no worker.

    Args:
        size: Height of rendered pictures.
        image_size: Height of the network's input.
        config: Random errors of the pictures.
        batch_size: Pictures of each number of people in a batch of all processes.
        start: Number of the first batch.
        num_workers: Not used.
        seed: Seed of the pictures.
        rows: Which pictures of each batch this process needs; None for all.
    """
    del num_workers
    needed = range(batch_size) if rows is None else rows
    rendered = sorted({row // config.variants for row in needed})
    for step in itertools.count(start):
        batch = {}
        for people in (1, 2):
            generators = [np.random.default_rng([seed, *_RENDERED, people, step, i]) for i in rendered]
            shown = dict(
                zip(rendered, zip(*draw_pictures(generators, people, size), strict=True), strict=True)
            )
            varied = []
            for row in needed:
                picture, points = shown[row // config.variants]
                rng = np.random.default_rng([seed, *_VARIED, people, step, row])
                varied.append(_vary(rng, fit_height(picture, image_size), points, config))
            batch[f"pictures_{people}"], batch[f"points_{people}"] = map(np.stack, zip(*varied, strict=True))
        yield batch


def _vary(
    rng: np.random.Generator,
    picture: UInt8[np.ndarray, "H W 3"],
    points: Float32[np.ndarray, "P 7 2"],
    config: FaceDetectorStageConfig,
) -> tuple[UInt8[np.ndarray, "H W 3"], Float32[np.ndarray, "P 7 2"]]:
    """Mirrors, scales and moves a picture at random, and changes its light and pixels."""
    height, width = picture.shape[:2]
    middle = np.array([width / height, 1.0]) / 2
    scale, shift = 1 + config.jitter * rng.normal(), config.jitter / 2 * rng.normal(size=2)
    if rng.uniform() < 0.5:
        picture, points = picture[:, ::-1], points[:, _MIRRORED] * [-1, 1] + [2 * middle[0], 0]
        points[:, :2, 0] = points[:, 1::-1, 0]  # the left side of the box is the right one of before
    offset = middle * (1 - scale) + shift
    moved = offset * height + (scale - 1) / 2  # coordinates of OpenCV are 0 in the middle of the first pixel
    matrix = np.array([[scale, 0, moved[0]], [0, scale, moved[1]]])
    warped = cv2.warpAffine(
        np.ascontiguousarray(picture), matrix, (width, height), borderMode=cv2.BORDER_REPLICATE
    )
    light = 1 + config.light * rng.normal()
    changed = light * warped + 255 * config.noise * rng.normal(size=warped.shape)
    return np.clip(changed, 0, 255).astype(np.uint8), (scale * points + offset).astype(np.float32)


def detector_loss(
    detector: MiniatureFaceDetector, batch: Batch, keys: Array
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of the heat, and distances of the points where it is high, in sides of a cell."""
    heats, distances = [], []
    for people in (1, 2):
        points = jnp.asarray(batch[f"points_{people}"])
        logits, predicted = detector(from_uint8(batch[f"pictures_{people}"]))
        heat, nearest = _heat(points, *logits.shape[1:])
        wanted = jnp.take_along_axis(points, nearest.reshape(len(points), -1, 1, 1), axis=1)
        error = jnp.abs(predicted - wanted.reshape(predicted.shape)).mean(axis=(-2, -1))
        heats.append(optax.sigmoid_binary_cross_entropy(logits, heat).mean())
        distances.append((heat * error).sum() / heat.sum() * detector.config.image_size / CELL)
    heat, distance = jnp.stack(heats).mean(), jnp.stack(distances).mean()
    return heat + distance, {"heat": heat, "distance": distance}


def _heat(points: Float[Array, "B P 7 2"], rows: int, columns: int) -> tuple[Float[Array, "B h w"], Array]:
    """The confidence that cells should have, and the person whose head is nearest to each."""
    corners = points[:, :, None, None, :2]
    centre, sides = corners.mean(axis=-2), corners[..., 1, :] - corners[..., 0, :]
    away = (cell_centres(rows, columns) - centre) / sides
    heat = jnp.exp(-jnp.square(away).sum(axis=-1) / (2 * _SPREAD**2))
    return heat.max(axis=1), heat.argmax(axis=1)
