"""Latents of a source video that sampling keeps: everything outside a mask, at each step's noise level.

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
    """Latents that are kept, and where they are not.

    Attributes:
        latents: The source's, without noise, `[B, F, h, w, C]`.
        mask: 1 where latents are free, 0 where the source is kept, `[B, F, h, w, 1]`.
    """

    latents: Leaf
    mask: Leaf


@jax.jit
def hold(
    latents: Float[Array, "B F h w C"],
    held: HeldLatents,
    noise: Float[Array, "B F h w C"],
    sigma: Float[Array | np.ndarray, ""] | float,
) -> Float[Array, "B F h w C"]:
    """Replaces latents outside the mask by the source's at a noise level.

    Args:
        latents: Latents after a step.
        held: What is kept.
        noise: The noise that sampling started from.
        sigma: Noise level after the step; at 0 the result outside the mask is the source's latents.
    """
    source = noised(held.latents, noise, sigma)
    return held.mask * latents + (1 - held.mask) * source


def noised(
    latents: Float[Array, "B F h w C"],
    noise: Float[Array, "B F h w C"],
    sigma: Float[Array | np.ndarray, ""] | float,
) -> Float[Array, "B F h w C"]:
    """`(1 - sigma) * latents + sigma * noise`, with one noise level for all samples."""
    return add_noise(latents, noise, jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), latents.shape[:1]))


def first_step(sigmas: Float[np.ndarray, " levels"], strength: float) -> int:
    """The step to start from: the one whose noise level is nearest to `strength`.

    The strength is a noise level and not a share of the steps, because with a shifted schedule half of the
    steps are far noisier than half (with a shift of 5: 0.83).

    Args:
        sigmas: Noise levels from 1 down to 0, from `flow.sampling_sigmas`.
        strength: In [0, 1]. At 1 all steps are taken, from noise; at 0 none.
    """
    return int(np.abs(sigmas - strength).argmin())
