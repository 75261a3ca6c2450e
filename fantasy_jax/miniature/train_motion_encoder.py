"""Training of the motion encoder: regression of the factors of motion from aligned faces.

PD-FGC's encoder is trained to drive a generator of faces (arXiv 2211.14506). The small one is trained to
predict the factors of synthetic faces instead, by a linear read-out of each of its heads. Every example shows
another face, so that what distinguishes people does not help. After the training, what the mouth's features
still tell of the person is erased.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fantasy_jax.config import Fraction, PositiveInt
from fantasy_jax.miniature.acting import Performance, draw_still
from fantasy_jax.miniature.erasure import erasing_projection
from fantasy_jax.miniature.faces import SyntheticFace, acting_face, draw_face, stack_faces
from fantasy_jax.miniature.rendering import face_points, render_batch
from fantasy_jax.miniature.stage import EncoderStageConfig, initialise_norms
from fantasy_jax.models.motion_encoder import MotionEncoder
from fantasy_jax.preprocessing.driving import align_face
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, Float32, UInt8

HEADS = {
    "headpose": ("turn", "nod"),
    "eye": ("gaze_x", "gaze_y", "blink", "lid"),
    "emotion": ("brow_inner", "brow_outer", "furrow", "lid", "smile", "asymmetry", "sneer"),
    "mouth": ("opening", "rounding", "jaw", "smile", "asymmetry", "sneer"),
}
"""The factors that are read from each head. Alignment hides the place of the head and its roll."""
READ = tuple(dict.fromkeys(name for names in HEADS.values() for name in names))
"""All factors that are read."""
PERSON = (
    *("size", "jaw", "skin", "hair", "hair_shape", "eyes", "iris", "brows", "nose", "mouth", "lips", "beard"),
    "glasses",
)
"""The numbers of a face that tell who it is."""
_TRAINING, _NORMS, _SCALES, _ERASED = (3, 0), (3, 1), (3, 2), (3, 3)
"""Parts of the seeds, apart from those of clips, of what is drawn: examples, and faces for statistics."""
_OPEN = 2.0
"""Initial bias before the ReLU of the encoder's single channel, which is about normal: few are below 0."""
_NORM_FACES, _SCALE_ACTS, _ERASED_FACES = 256, 4096, 1024
_BATCH = 64
"""Pictures that are drawn and encoded at a time."""


@dataclass(frozen=True)
class MotionStageConfig(EncoderStageConfig):
    """Training of the motion encoder.

    Attributes:
        num_steps: Training steps.
        batch_size: Faces per step.
        optimizer: The optimizer.
        jitter: Standard deviation of random errors of the points, as a fraction of the distance of the eyes.
        light: Standard deviation of the relative brightness.
    """

    num_steps: PositiveInt = 2500
    batch_size: PositiveInt = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, warmup_steps=100)
    jitter: Fraction = 0.03
    light: Fraction = 0.12


class MotionRegressor(nnx.Module):
    """The motion encoder with a linear read-out of each head; only used in training."""

    def __init__(self, encoder: MotionEncoder, *, rngs: nnx.Rngs):
        """Adds the read-outs to an encoder, whose narrowest layer lets everything pass at first."""
        config = encoder.config
        encoder.conv_map.bias[...] = jnp.full_like(encoder.conv_map.bias[...], _OPEN)
        widths = (config.pose_dim, config.eye_dim, config.emotion_dim, config.feature_dim)
        self.encoder = encoder
        self.readouts = nnx.Dict(
            {
                head: nnx.Linear(width, len(names), rngs=rngs)
                for (head, names), width in zip(HEADS.items(), widths, strict=True)
            }
        )

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> dict[str, Float[Array, "B _"]]:
        """The factors that are read from each head, in the order of `HEADS`, in standard deviations."""
        parts = self.encoder.parts(self.encoder.face_feature(pixels))
        return {head: readout(getattr(parts, head)) for head, readout in self.readouts.items()}


@dataclass(frozen=True)
class Stills:
    """Pictures of people, one of each.

    Attributes:
        people: The people.
        acts: Their motion, of one frame.
        crops: Aligned faces.
    """

    people: list[SyntheticFace]
    acts: list[Performance]
    crops: UInt8[np.ndarray, "B S S 3"]

    def factors(self) -> Float32[np.ndarray, "B R"]:
        """The factors `READ`."""
        return np.stack([[getattr(act, name)[0] for name in READ] for act in self.acts]).astype(np.float32)

    def numbers(self) -> Float32[np.ndarray, "B I"]:
        """The numbers `PERSON` of every face."""
        rows = [[np.ravel(getattr(face, name)) for name in PERSON] for face in self.people]
        return np.stack([np.concatenate(row) for row in rows]).astype(np.float32)


def draw_stills(
    generators: Sequence[np.random.Generator],
    *,
    size: int,
    crop_size: int,
    jitter: float = 0.0,
    light: float = 0.0,
    unseen: bool = False,
) -> Stills:
    """Draws and renders a person for each random generator.

    Args:
        generators: Random generators.
        size: Height and width of the pictures.
        crop_size: Height and width of the aligned faces.
        jitter: As in `MotionStageConfig`.
        light: As in `MotionStageConfig`.
        unseen: Whether faces are from just outside the usual ranges.
    """
    people = [acting_face(draw_face(rng, unseen=unseen)) for rng in generators]
    acts = [draw_still(rng) for rng in generators]
    faces = jax.tree.map(lambda x: x[:, None], stack_faces(people))
    stacked = jax.tree.map(lambda *x: np.stack(x)[:, None], *acts)
    pixels, _ = render_batch(faces, stacked, np.zeros((len(people), 1), np.float32), size=size)
    frames = np.round((pixels[:, 0] + 1) * 127.5).astype(np.uint8)
    crops = []
    for frame, face, act, rng in zip(frames, people, acts, generators, strict=True):
        points = (face_points(face, act)[0].astype(np.float64) + 1) * size / 2
        points += jitter * np.linalg.norm(points[0] - points[1]) * rng.normal(size=points.shape)
        crop = align_face(frame, points, crop_size)
        crops.append(np.clip(crop * (1 + light * rng.normal()), 0, 255).astype(np.uint8))
    return Stills(people, acts, np.stack(crops))


def still_batches(
    seed: Sequence[int],
    numbers: range,
    description: str,
    *,
    size: int,
    crop_size: int,
    unseen: bool = False,
) -> Iterator[Stills]:
    """Yields pictures of people, a batch at a time, with a progress bar.

    Args:
        seed: Seed of the people.
        numbers: Their numbers, each the last part of a person's seed.
        description: Label of the progress bar.
        size: Height and width of the pictures.
        crop_size: Height and width of the aligned faces.
        unseen: Whether faces are from just outside the usual ranges.
    """
    for start in tqdm(range(0, len(numbers), _BATCH), desc=description, unit="batch"):
        generators = [np.random.default_rng([*seed, i]) for i in numbers[start : start + _BATCH]]
        yield draw_stills(generators, size=size, crop_size=crop_size, unseen=unseen)


def read_stills(
    read: Callable[[UInt8[np.ndarray, "B S S 3"]], Array | np.ndarray], batches: Iterable[Stills]
) -> tuple[Float[np.ndarray, "N M"], Float[np.ndarray, "N R"], Float[np.ndarray, "N I"]]:
    """What is read from the faces of people, with their factors and the numbers of their faces.

    Args:
        read: Returns values of each of a batch of aligned faces.
        batches: The people (`still_batches`).
    """
    rows = [(np.asarray(read(stills.crops)), stills.factors(), stills.numbers()) for stills in batches]
    values, factors, numbers = map(np.concatenate, zip(*rows, strict=True))
    return values, factors, numbers


def motion_batches(
    size: int,
    crop_size: int,
    config: MotionStageConfig,
    *,
    batch_size: int,
    start: int,
    num_workers: int,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields batches without end, from batch number `start` on, each of people never seen before.

    Arguments are those of `data.loader.batches`; nothing is read, and rendering takes no worker.

    Args:
        size: Height and width of the pictures.
        crop_size: Height and width of the aligned faces.
        config: Random errors of the examples.
        batch_size: Examples in a batch of all processes.
        start: Number of the first batch.
        num_workers: Not used.
        seed: Seed of the people.
        rows: Which examples of each batch this process needs; None for all.
    """
    del num_workers
    needed = range(batch_size) if rows is None else rows
    means, deviations = factor_statistics()
    for step in itertools.count(start):
        generators = [np.random.default_rng([seed, *_TRAINING, step, row]) for row in needed]
        stills = draw_stills(
            generators, size=size, crop_size=crop_size, jitter=config.jitter, light=config.light
        )
        yield {"faces": stills.crops, "factors": (stills.factors() - means) / deviations}


def factor_statistics() -> tuple[Float32[np.ndarray, " R"], Float32[np.ndarray, " R"]]:
    """Mean and deviation of the factors `READ` over `draw_still`."""
    acts = [draw_still(np.random.default_rng([*_SCALES, i])) for i in range(_SCALE_ACTS)]
    values = np.array([[getattr(act, name)[0] for name in READ] for act in acts])
    return values.mean(axis=0).astype(np.float32), values.std(axis=0).astype(np.float32)


def motion_loss(regressor: MotionRegressor, batch: Batch, keys: Array) -> tuple[Float[Array, ""], Metrics]:
    """Mean squared error of the factors, in standard deviations. The norms use the batch's statistics."""
    regressor = nnx.clone(regressor)  # the norms of the copy note statistics, which are not used
    regressor.train()
    predicted = regressor(from_uint8(batch["faces"]))
    target = dict(zip(READ, jnp.asarray(batch["factors"]).T, strict=True))
    errors = {
        f"{head}/{name}": jnp.square(values[:, i] - target[name]).mean()
        for head, values in predicted.items()
        for i, name in enumerate(HEADS[head])
    }
    return jnp.stack(list(errors.values())).mean(), errors


def finish_norms(encoder: MotionEncoder, size: int, seed: int) -> None:
    """Sets the statistics of the norms, which are those of each batch during training, to those of faces.

    Args:
        encoder: The trained encoder.
        size: Height and width of the pictures.
        seed: Seed of the people.
    """
    people, crop_size = range(_NORM_FACES), encoder.config.image_size
    batches = still_batches((seed, *_NORMS), people, "Norms", size=size, crop_size=crop_size)
    initialise_norms(encoder, np.concatenate([stills.crops for stills in batches]))


def erase_person(encoder: MotionEncoder, size: int, seed: int) -> None:
    """Removes from the mouth's features what tells people apart, except in the directions of its factors.

    The loss does not ask for the size of the face or its colors, nor does it penalise them in so wide a head.
    The last layer of the head takes up the projection (`erasing_projection`).

    Args:
        encoder: The trained encoder, whose norms are set.
        size: Height and width of the pictures.
        seed: Seed of the people.
    """
    encode = nnx.jit(lambda encoder, faces: encoder.parts(encoder.face_feature(from_uint8(faces))).mouth)
    people, crop_size = range(_ERASED_FACES), encoder.config.image_size
    batches = still_batches((seed, *_ERASED), people, "Erasure", size=size, crop_size=crop_size)
    features, factors, numbers = read_stills(partial(encode, encoder), batches)
    features = features.astype(np.float64)
    wanted = [READ.index(name) for name in HEADS["mouth"]]
    projection = erasing_projection(features, numbers, kept=factors[:, wanted])
    mean, layer = features.mean(axis=0), encoder.heads["mouth"].dense2
    layer.kernel[...] = jnp.asarray(np.asarray(layer.kernel[...]) @ projection, layer.kernel.dtype)
    moved = (np.asarray(layer.bias[...]) - mean) @ projection + mean
    layer.bias[...] = jnp.asarray(moved, layer.bias.dtype)
