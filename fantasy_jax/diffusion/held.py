"""Latents that are held while others are generated: those outside a mask, or those of a block before."""

from dataclasses import dataclass

import jax

from fantasy_jax.typing import Array, Float, Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldLatents:
    """Known latents of a clip.

    Attributes:
        latents: `[1, F, h, w, C]`; those that are generated have any value.
        mask: 1 where latents are generated and 0 where they are held, `[1, F, h or 1, w or 1, 1]`.
    """

    latents: Leaf
    mask: Leaf


def hold(
    latents: Float[Array, "1 F h w C"],
    held: HeldLatents,
    noise: Float[Array, "1 F h w C"],
    sigma: Float[Array, ""],
) -> Float[Array, "1 F h w C"]:
    """Replaces latents outside the mask by the held ones at a noise level.

    Source: diffusers, `pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py`, for models without a
    mask among their inputs.

    Args:
        latents: Latents after a step.
        held: What is known.
        noise: The initial noise.
        sigma: Noise level after the step; at 0 the held latents are exact.
    """
    known = (1 - sigma) * held.latents + sigma * noise
    return held.mask * latents + (1 - held.mask) * known
