"""The training loss: the error of the velocity, everywhere or at the lips."""

import jax
import jax.numpy as jnp

from fantasy_jax.typing import Array, Bool, Float
from fantasy_jax.video import latent_frames


def project_mask(
    mask: Float[Array, "B T H W"], height: int, width: int
) -> Float[Array, "B F {height} {width}"]:
    """Projects a pixel mask onto the latent grid, by trilinear interpolation (arXiv 2504.04842, 3.2).

    As in the VAE, the first frame is one latent frame and every four frames after it make one. The
    interpolation is antialiased, over all pixels that a latent covers: a closed mouth is lower than the eight
    rows of a latent.
    """
    batch, frames = mask.shape[:2]
    first = jax.image.resize(mask[:, :1], (batch, 1, height, width), "trilinear")
    rest = jax.image.resize(mask[:, 1:], (batch, latent_frames(frames) - 1, height, width), "trilinear")
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
    """Mean squared error of each sample, over the lips where `masked` is set (arXiv 2504.04842, equation 6).

    Args:
        velocity: Predicted velocity.
        target: Noise minus data.
        lips: From `project_mask`; a sample whose mask is empty takes the unmasked loss.
        masked: Samples whose loss is masked.
        outside: Weight outside the mask, where lips have weight 1; the paper's is 0.
        by_area: Whether the masked error is divided by the mask's area, and not by the image's. The paper
            does not say. Undivided, small mouths contribute little, and the learning rate has another meaning
            than in the unmasked loss, which is a hundred times as large.
    """
    masked = masked & (lips.sum(axis=(1, 2, 3)) > 0)
    weight = jnp.where(masked[:, None, None, None], outside + (1 - outside) * lips, 1.0)
    error = jnp.square(velocity - target).mean(axis=-1)
    area = weight if by_area else jnp.ones_like(weight)
    return (weight * error).sum(axis=(1, 2, 3)) / area.sum(axis=(1, 2, 3))
