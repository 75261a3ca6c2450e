"""How much of a video the VAE takes at once: whole images where memory allows, and several latent frames."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fantasy_jax.models.halo import num_row_shards
from fantasy_jax.models.vae import VAEConfig, WanVAE
from fantasy_jax.typing import DType
from fantasy_jax.video import TEMPORAL_FACTOR

MOST_AT_ONCE = 4
"""Latent frames that are processed together at most."""
_MARGIN = 0.7
"""Fraction of the free memory that the account may take; workspaces of convolutions are not part of it."""


def temporary_bytes(config: VAEConfig, dtype: DType, latent_size: Sequence[int], at_once: int = 1) -> int:
    """Temporaries of encoding or decoding on one device, by the largest arrays that are in memory together.

    Those have the size of the image and the width of the second stage: three times the frames of the chunk,
    and twelve frames for those of the chunk before. For a v5p XLA needed 2.23 GiB to encode 512 x 512 and
    2.15 GiB to decode it, for which this is 2.25; on CPUs it needs seven tenths (`docs/performance.md`).

    Args:
        config: Sizes of the VAE.
        dtype: Type of its products.
        latent_size: Rows and columns in latents.
        at_once: Latent frames that are processed together.
    """
    rows, columns = latent_size
    pixels = 4 ** len(config.temporal_downsample) * -(-rows // num_row_shards()) * columns
    frame = pixels * config.dim * max(config.dim_mult[:2]) * jnp.dtype(dtype).itemsize
    return (3 * TEMPORAL_FACTOR * at_once + 12) * frame


def free_bytes() -> int | float:
    """Bytes of the device that no array takes; infinite on devices that do not report it, such as CPUs."""
    found = jax.local_devices()[0].memory_stats() or {}
    return found.get("bytes_limit", math.inf) - found.get("bytes_in_use", 0)


def most_at_once(vae: WanVAE, latent_size: Sequence[int], free: int | float, kept: int = 0) -> int:
    """Latent frames of whole images that the VAE can process together; 0 if not even one fits.

    Args:
        vae: The VAE.
        latent_size: Rows and columns in latents.
        free: Bytes that no array takes (`free_bytes`).
        kept: Bytes of the causal caches between chunks.
    """
    if math.isinf(free):
        return 1
    fitting = (
        count
        for count in range(MOST_AT_ONCE, 0, -1)
        if kept + temporary_bytes(vae.config, vae.moments.dtype, latent_size, count) <= _MARGIN * free
    )
    return next(fitting, 0)


def largest_divisor(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`: chunks of one length need a single program."""
    return next(divisor for divisor in range(max(most, 1), 0, -1) if count % divisor == 0)


def encoded_at_once(
    vae: WanVAE, latent_size: Sequence[int], num_latent_frames: int, free: int | float
) -> int:
    """Latent frames of a chunk of `WanVAE.encode`; the arguments are as of `most_at_once`."""
    return largest_divisor(num_latent_frames - 1, most_at_once(vae, latent_size, free))
