"""A judge of acts: a motion encoder that only measures, with the read-outs that it is trained with.

Its sizes and seed are not those of the model's motion encoder, so that it does not share its errors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fantasy_jax.config import Fraction, Seed, Settings
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.train_motion_encoder import (
    HEADS,
    READ,
    MotionRegressor,
    MotionStageConfig,
    factor_statistics,
    finish_norms,
    motion_batches,
    motion_loss,
    read_stills,
    still_batches,
)
from fantasy_jax.models.motion_encoder import MotionEncoderConfig
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.system.registry import component_of
from fantasy_jax.training.loop import LoopConfig, TrainingTask, train
from fantasy_jax.training.stages import without
from fantasy_jax.typing import Array, Float, UInt8

GROUPS = {
    "pose": ("turn", "nod"),
    "gaze": ("gaze_x", "gaze_y"),
    "expression": tuple(name for name in READ if name not in ("turn", "nod", "gaze_x", "gaze_y")),
}
"""The factors by what they belong to."""
FOLLOWED = ("opening", "smile")
"""The factors whose curves are compared with those of drivers."""
_PEOPLE, _NUM_PEOPLE, _BATCH = (5, 0), 1024, 64
"""Part of the seeds, apart from those of clips and of training, and number of the people who test a judge."""


@dataclass(frozen=True)
class JudgeConfig(Settings):
    """The judge and its training.

    Attributes:
        encoder: Sizes of its motion encoder.
        stage: Its training.
        seed: Seed of its weights and of the people it is trained on.
        least_r2: Least share of a factor's variance, over people never seen, that it has to explain; factors
            that it reads worse are not judged.
    """

    encoder: MotionEncoderConfig = MotionEncoderConfig(
        width=40, feature_dim=112, emotion_dim=16, landmarks=16, depth=3, image_size=64
    )
    stage: MotionStageConfig = MotionStageConfig()
    seed: Seed = 1
    least_r2: Fraction = 0.7


class Judge:
    """Reads factors of motion from aligned faces.

    Attributes:
        factors: Names of the factors that it reads.
        image_size: Side of an aligned face, in pixels.
    """

    def __init__(self, regressor: MotionRegressor, r2: Mapping[str, float], least_r2: float = 0.0):
        """Chooses the factors.

        Args:
            regressor: The trained encoder with its read-outs.
            r2: Share of the variance that is explained, by factor.
            least_r2: Least share.

        Raises:
            ConfigError: It reads opening, smile, turn and nod, or gaze too badly.
        """
        self._regressor = regressor
        self.image_size = regressor.encoder.config.image_size
        self.factors = tuple(name for name in READ if r2[name] >= least_r2)
        enough = set(FOLLOWED) <= set(self.factors) and all(map(self.indices, GROUPS.values()))
        if not enough:
            measured = ", ".join(f"{name} {value:.2f}" for name, value in r2.items())
            raise ConfigError(
                f"judge.least_r2 is {least_r2:g}, but the judge's R2 are {measured}; opening, smile, and one "
                "factor each of pose and gaze are needed: set judge.stage.num_steps higher"
            )

    def indices(self, names: Sequence[str]) -> list[int]:
        """Where those of the named factors that it reads are in its readings."""
        return [self.factors.index(name) for name in names if name in self.factors]

    def __call__(self, faces: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N K"]:
        """The factors of aligned faces, in standard deviations (`train_motion_encoder.factor_statistics`)."""
        readings = read_factors(self._regressor, faces)
        return readings[:, [READ.index(name) for name in self.factors]]


def read_factors(regressor: MotionRegressor, faces: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N R"]:
    """The factors `READ` in standard deviations, each the mean of what the heads that have it read."""
    found = []
    for start in range(0, len(faces), _BATCH):
        batch = faces[start : start + _BATCH]
        filled = np.concatenate([batch, np.repeat(batch[:1], _BATCH - len(batch), axis=0)])
        found.append(np.asarray(_read(regressor, filled))[: len(batch)])
    return np.concatenate(found)


@nnx.jit
def _read(regressor: MotionRegressor, faces: UInt8[Array, "N S S 3"]) -> Float[Array, "N R"]:
    heads = regressor(from_uint8(faces))
    read = {
        name: [heads[head][:, names.index(name)] for head, names in HEADS.items() if name in names]
        for name in READ
    }
    return jnp.stack([sum(values) / len(values) for values in read.values()], axis=-1)


def train_judge(config: JudgeConfig, size: int, folder: Path, mesh: Mesh) -> Judge:
    """Trains the judge, resumes, or takes over a finished one, and measures how well it reads each factor.

    Args:
        config: The judge.
        size: Height and width of the pictures.
        folder: Folder of its checkpoints.
        mesh: Mesh of all devices.

    Raises:
        ConfigError: The folder holds a judge with other settings, or it reads too few factors.
    """
    encoder = component_of(config.encoder).init(config.encoder, jnp.float32, seed=config.seed)
    crop_size = config.encoder.image_size
    task = TrainingTask(
        "judge",
        MotionRegressor(encoder, rngs=nnx.Rngs(config.seed)),
        motion_loss,
        partial(motion_batches, size, crop_size, config.stage),
        config.stage.batch_size,
        config.stage.num_steps,
        config.stage.optimizer,
        settings={
            "video": {"height": size},
            "judge": without(config, "stage", "least_r2") | {"stage": without(config.stage, "num_steps")},
        },
    )
    trained = train(task, LoopConfig(num_workers=0, seed=config.seed), folder, mesh)
    finish_norms(trained.encoder, size, config.seed)
    return Judge(trained, explained(trained, size), config.least_r2)


def explained(regressor: MotionRegressor, size: int) -> dict[str, float]:
    """Share of the variance (R2) of each factor that is read from the faces of people never seen.

    Args:
        regressor: The trained encoder with its read-outs.
        size: Height and width of the pictures.
    """
    crop_size, (means, deviations) = regressor.encoder.config.image_size, factor_statistics()
    batches = still_batches(_PEOPLE, range(_NUM_PEOPLE), "Judge", size=size, crop_size=crop_size)
    read, factors, _ = read_stills(partial(read_factors, regressor), batches)
    known = (factors - means) / deviations
    r2 = 1 - np.square(read - known).mean(axis=0) / known.var(axis=0)
    return dict(zip(READ, r2.tolist(), strict=True))
