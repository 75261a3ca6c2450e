"""Contrastive training of the face encoder: recognition of a person in any pose, expression and light.

ArcFace is trained as a classifier with many images of each person. Here every clip shows another person, so
two frames of a clip are contrasted with the other clips of the batch instead.
"""

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.config import Fraction, PositiveFloat, PositiveInt, Range
from fantasy_jax.data.records import Record
from fantasy_jax.miniature.stage import EncoderStageConfig
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.preprocessing.face_crop import crop_face, points_in_box
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, UInt8


@dataclass(frozen=True)
class FaceStageConfig(EncoderStageConfig):
    """Training of the face encoder.

    Attributes:
        num_steps: Training steps.
        batch_size: Clips per step, each of another person.
        optimizer: The optimizer.
        temperature: Temperature of the softmax over cosines.
        jitter: Standard deviation of random errors of the face box, as a fraction of its size.
        light: Standard deviation of the relative brightness.
    """

    num_steps: PositiveInt = 400
    batch_size: Annotated[int, Range(2, 2**20)] = 48
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)
    temperature: PositiveFloat = 0.1
    jitter: Fraction = 0.04
    light: Fraction = 0.15


@dataclass(frozen=True)
class FacePairs:
    """Crops the faces of two random frames of a clip: bytes, `[2, size, size, 3]`."""

    size: int
    jitter: float
    light: float

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Crops with random errors of the box and random brightness."""
        indices = rng.integers(len(record["video"]), size=2).tolist()
        return {"faces": np.stack([self._crop(record, rng, index) for index in indices])}

    def _crop(self, record: Record, rng: np.random.Generator, index: int) -> UInt8[np.ndarray, "S S 3"]:
        box = record["face_box"][index]
        box = box + self.jitter * rng.normal(size=4) * np.tile(box[2:] - box[:2], 2)
        face = crop_face(record["video"][index], points_in_box(box), self.size)
        return np.clip(face * (1 + self.light * rng.normal()), 0, 255).astype(np.uint8)


def face_loss(
    encoder: FaceEncoder, batch: Batch, keys: Array, *, temperature: float
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE loss of the cosines between the first and second faces of all clips."""
    faces = jnp.asarray(batch["faces"])
    vectors, _ = encoder(from_uint8(faces.reshape(-1, *faces.shape[2:])))
    vectors = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    first, second = vectors[::2], vectors[1::2]
    cosines = first @ second.T
    positive = jnp.diagonal(cosines)
    normaliser = sum(jax.nn.logsumexp(cosines / temperature, axis=axis) for axis in (0, 1)) / 2
    accuracy = (cosines.argmax(axis=1) == jnp.arange(len(positive))).mean()
    loss = (normaliser - positive / temperature).mean()
    return loss, {"cosine": positive.mean(), "accuracy": accuracy}
