"""Flow matching with a shifted schedule: noise levels, noising, and the velocity target.

A noise level sigma goes from 1 (noise) to 0 (data); the transformer's timestep is `1000 * sigma`. Source:
fantasy-talking, `diffsynth/schedulers/flow_match.py`, as its pipeline configures it (shift 5, smallest sigma
0, one step more than is used).
"""

from functools import partial
from typing import Literal

import jax
import numpy as np

from fantasy_jax.typing import Array, Float, Float32


def shift_sigma(sigma: Float[Array | np.ndarray, "*n"], shift: float) -> Float[Array | np.ndarray, "*n"]:
    """Shifts noise levels towards noise: `shift * s / (1 + (shift - 1) * s)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int, shift: float) -> Float32[np.ndarray, " {steps}+1"]:
    """Noise levels of a sampler's steps, from 1 down to 0.

    Args:
        steps: Number of steps, at least 1.
        shift: Shift of the schedule; 1 is even spacing.
    """
    return shift_sigma(np.linspace(1, 0, steps + 1), shift).astype(np.float32)


def draw_sigmas(
    keys: Array,
    *,
    timesteps: Literal["uniform", "logit_normal"],
    shift: float,
    mean: float = 0.0,
    std: float = 1.0,
) -> Float32[Array, " B"]:
    """Draws a noise level for each key.

    Args:
        keys: Random keys, `[B]`.
        timesteps: Uniform, or the sigmoid of a normal distribution (arXiv 2403.03206, section 3.1), which is
            denser in the middle, where the velocity is hardest to predict.
        shift: Shift of the schedule, applied to the drawn levels.
        mean: Mean of the normal distribution.
        std: Standard deviation of the normal distribution.
    """
    if timesteps == "uniform":
        sigma = jax.vmap(jax.random.uniform)(keys)
    else:
        sigma = jax.nn.sigmoid(mean + std * jax.vmap(jax.random.normal)(keys))
    return shift_sigma(sigma, shift)


def add_noise(
    latents: Float[Array, " B *n"], noise: Float[Array, " B *n"], sigma: Float[Array, " B"]
) -> Float[Array, " B *n"]:
    """`(1 - sigma) * latents + sigma * noise`."""
    sigma = sigma.reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Float[Array, " B *n"], noise: Float[Array, " B *n"]) -> Float[Array, " B *n"]:
    """The velocity that the transformer is trained to predict: noise minus data."""
    return noise - latents


@partial(jax.jit, donate_argnums=0)
def predicted_latents(
    before: Float[Array, "B F h w C"],
    after: Float[Array, "B F h w C"],
    sigmas: Float[Array | np.ndarray, "2"],
) -> Float[Array, "B F h w C"]:
    """Latents without noise as a step predicts them: the line through both states, at noise level 0.

    Args:
        before: Latents at the first noise level; donated.
        after: Latents at the second one.
        sigmas: Noise levels before and after the step.
    """
    return after - sigmas[1] * (after - before) / (sigmas[1] - sigmas[0])
