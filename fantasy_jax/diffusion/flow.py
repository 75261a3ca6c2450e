"""Flow matching with a shifted schedule: noise levels, noising, the velocity target, training weights.

A noise level sigma runs from 1 (noise) to 0 (data); the timestep that the transformer is told is
`1000 * sigma`. Source: fantasy-talking, `diffsynth/schedulers/flow_match.py`, as its pipeline configures it
(shift 5, smallest sigma 0, one step more than is used).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.typing import Array, Float, Float32

TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma: Float[Array | np.ndarray, "*n"], shift: float) -> Float[Array | np.ndarray, "*n"]:
    """Moves noise levels towards noise: `shift * s / (1 + (shift - 1) * s)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int, shift: float) -> Float32[np.ndarray, " {steps}+1"]:
    """Noise levels at which a sampler evaluates the velocity, from 1 down, and the 0 at which it ends.

    Args:
        steps: Evaluations, at least 1.
        shift: Of the schedule; 1 is even spacing.
    """
    return shift_sigma(np.linspace(1, 0, steps + 1), shift).astype(np.float32)


def draw_sigmas(
    keys: Array,
    *,
    timesteps: Literal["uniform", "logit_normal"],
    shift: float,
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Float32[Array, " B"]:
    """Noise levels to train at, one for each key.

    Args:
        keys: Random keys, `[B]`.
        timesteps: Even, or the sigmoid of a normal distribution (arXiv 2403.03206, section 3.1), which is
            denser in the middle, where the velocity is hardest to tell.
        shift: As in sampling; applied to what was drawn.
        mean: Of the normal distribution.
        deviation: Of the normal distribution.
    """
    if timesteps == "uniform":
        sigma = jax.vmap(jax.random.uniform)(keys)
    else:
        sigma = jax.nn.sigmoid(mean + deviation * jax.vmap(jax.random.normal)(keys))
    return shift_sigma(sigma, shift)


def add_noise(
    latents: Float[Array, "B *n"], noise: Float[Array, "B *n"], sigma: Float[Array, " B"]
) -> Float[Array, "B *n"]:
    """`(1 - sigma) * latents + sigma * noise`."""
    sigma = sigma.reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Float[Array, "B *n"], noise: Float[Array, "B *n"]) -> Float[Array, "B *n"]:
    """What the transformer learns to predict: noise minus data."""
    return noise - latents


def training_weight(timestep: Float[Array, " B"], *, shift: float = 5.0) -> Float[Array, " B"]:
    """Weight of the loss at a timestep: a bell around the middle, of mean 1 over the shifted schedule.

    Args:
        timestep: In [0, 1000].
        shift: Of the schedule over which the mean is taken.
    """
    levels = TRAIN_TIMESTEPS * sampling_sigmas(TRAIN_TIMESTEPS, shift)[:-1].astype(np.float64)
    bell = np.exp(-2 * (levels / TRAIN_TIMESTEPS - 0.5) ** 2)
    floor, mean = bell.min(), bell.mean()
    return (jnp.exp(-2 * (timestep / TRAIN_TIMESTEPS - 0.5) ** 2) - floor) / (mean - floor)
