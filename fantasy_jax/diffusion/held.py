"""Latents that are held while others are generated: those outside a mask, or those of a block before.

Source: RePaint (arXiv 2201.09865) without resampling, with one noise for all steps.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.diffusion.flow import add_noise
from fantasy_jax.typing import Array, Float, Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldLatents:
    """Latents that are known, and where they are held.

    Attributes:
        latents: Without noise, `[B, F, h, w, C]`; those that are generated have any value.
        mask: 1 where latents are generated, 0 where they are held, `[B, F, h or 1, w or 1, 1]`.
    """

    latents: Leaf
    mask: Leaf


def hold(
    latents: Float[Array, "B F h w C"],
    held: HeldLatents,
    noise: Float[Array, "B F h w C"],
    sigma: Float[Array | np.ndarray, ""] | float,
) -> Float[Array, "B F h w C"]:
    """Replaces latents outside the mask by the held ones at a noise level.

    Args:
        latents: Latents after a step.
        held: What is held.
        noise: The noise that sampling started from.
        sigma: Noise level after the step; at 0 the result outside the mask is exactly what is held.
    """
    return held.mask * latents + (1 - held.mask) * noised(held.latents, noise, sigma)


def noised(
    latents: Float[Array, "B F h w C"],
    noise: Float[Array, "B F h w C"],
    sigma: Float[Array | np.ndarray, ""] | float | np.floating,
) -> Float[Array, "B F h w C"]:
    """`(1 - sigma) * latents + sigma * noise`, with one noise level for all samples."""
    return add_noise(latents, noise, jnp.broadcast_to(sigma, latents.shape[:1]))


def first_step(sigmas: Float[np.ndarray, " levels"], strength: float) -> int:
    """The step to start from: the one whose noise level is nearest to `strength`.

    The strength is a noise level and not a share of the steps, because with a shifted schedule half of the
    steps are far noisier than half (with a shift of 5: 0.83).

    Args:
        sigmas: Noise levels from 1 down to 0, from `flow.sampling_sigmas`.
        strength: In [0, 1]. At 1 all steps are taken, from noise; at 0 none.
    """
    return int(np.abs(sigmas - strength).argmin())
