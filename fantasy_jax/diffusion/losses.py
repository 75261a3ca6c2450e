"""What the transformer is trained on: the error of its velocity, everywhere or at the lips."""

import jax
import jax.numpy as jnp

from fantasy_jax.models.vae import CHUNK
from fantasy_jax.typing import Array, Bool, Float


def project_mask(
    mask: Float[Array, "B T H W"], height: int, width: int
) -> Float[Array, "B F {height} {width}"]:
    """A mask of pixels on the grid of the latents, by trilinear interpolation (arXiv 2504.04842, 3.2).

    As in the VAE, the first frame stands alone and every four after it make one. Interpolated over what a
    latent covers, not between its two middle pixels: a closed mouth is lower than eight rows.
    """
    batch, frames = mask.shape[:2]
    first = jax.image.resize(mask[:, :1], (batch, 1, height, width), "trilinear")
    rest = jax.image.resize(mask[:, 1:], (batch, (frames - 1) // CHUNK, height, width), "trilinear")
    return jnp.concatenate([first, rest], axis=1)


def velocity_loss(
    velocity: Float[Array, "B F h w C"],
    target: Float[Array, "B F h w C"],
    lips: Float[Array, "B F h w"],
    masked: Bool[Array, " B"],
    *,
    outside: float = 0.0,
    by_area: bool = True,
) -> Float[Array, " B"]:
    """Mean square error of each sample, over the lips where `masked` says so (eq. 6 of arXiv 2504.04842).

    Args:
        velocity: Predicted.
        target: Noise minus data.
        lips: From `project_mask`; a sample whose mask is empty takes the plain loss.
        masked: Which samples are masked.
        outside: Weight of what lies outside of the mask, where lips have 1; the paper's is 0.
        by_area: Whether the masked error is divided by the mask's area, and not by that of the picture. The
            paper does not tell. Undivided, small mouths would teach little, and the learning rate would mean
            another thing than in the plain loss, which is a hundred times as large.
    """
    masked = masked & (lips.sum(axis=(1, 2, 3)) > 0)
    weight = jnp.where(masked[:, None, None, None], outside + (1 - outside) * lips, 1.0)
    error = jnp.square(velocity - target).mean(axis=-1)
    area = weight if by_area else jnp.ones_like(weight)
    return (weight * error).sum(axis=(1, 2, 3)) / area.sum(axis=(1, 2, 3))
