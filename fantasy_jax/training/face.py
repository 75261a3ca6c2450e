"""Training the face encoder of the small system: whose face is it, whatever it does?

ArcFace learns from many pictures of each person, with a class for everybody. Here each clip is a person of
its own; so two frames of one clip are told from the other clips' of the batch instead.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import ConfigError
from fantasy_jax.data.face_crop import crop_face, points_in_box
from fantasy_jax.data.records import Record
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.pipeline import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, UInt8


@dataclass(frozen=True)
class FaceStageConfig:
    """How the face encoder is trained.

    Attributes:
        steps: How long.
        batch_size: Clips in a batch, each of another person.
        temperature: Of the softmax over cosines.
        jitter: Deviation of where the face is said to be, as a share of its size; detectors err, too.
        light: Deviation of the brightness, likewise; a person is the same in the shade.
        optimizer: How parameters follow.
    """

    steps: int = 400
    batch_size: int = 48
    temperature: float = 0.1
    jitter: float = 0.04
    light: float = 0.15
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3)

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 2:
            raise ConfigError("steps must be at least 1, and batch_size at least 2: others are needed")


@dataclass(frozen=True)
class TwoFrames:
    """Cuts the faces out of two frames of a clip: bytes, `[2, size, size, 3]`."""

    size: int
    jitter: float
    light: float

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Cuts them, neither quite where they are nor in the same light."""
        numbers = rng.integers(len(record["video"]), size=2).tolist()
        return {"faces": np.stack([self._cut(record, rng, number) for number in numbers])}

    def _cut(self, record: Record, rng: np.random.Generator, number: int) -> UInt8[np.ndarray, "S S 3"]:
        box = record["face_box"][number]
        box = box + self.jitter * rng.normal(size=4) * np.tile(box[2:] - box[:2], 2)
        face = crop_face(record["video"][number], points_in_box(box), self.size)
        return np.clip(face * (1 + self.light * rng.normal()), 0, 255).astype(np.uint8)


def start_from_faces(encoder: FaceEncoder, faces: UInt8[np.ndarray, "N S S 3"]) -> None:
    """Sets the statistics of all norms to those of some faces; in training they stay as they are."""
    encoder.train()
    update = nnx.jit(lambda encoder, pixels: encoder(pixels))
    for _ in range(50):  # each call goes a tenth of the way
        update(encoder, from_uint8(faces))
    encoder.eval()


def face_loss(
    encoder: FaceEncoder, batch: Batch, keys: Array, *, temperature: float
) -> tuple[Float[Array, ""], Metrics]:
    """InfoNCE of the cosines between the clips' first and second faces, both ways."""
    faces = jnp.asarray(batch["faces"])
    vectors, _ = encoder(from_uint8(faces.reshape(-1, *faces.shape[2:])))
    vectors = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    first, second = vectors[::2], vectors[1::2]
    cosines = first @ second.T
    own = jnp.diagonal(cosines)
    others = sum(jax.nn.logsumexp(cosines / temperature, axis=axis) for axis in (0, 1)) / 2
    found = (cosines.argmax(axis=1) == jnp.arange(len(own))).mean()
    return (others - own / temperature).mean(), {"cosine": own.mean(), "found": found}
