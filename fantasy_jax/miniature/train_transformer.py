"""Initial weights of the small transformer."""

import jax
import jax.numpy as jnp

from fantasy_jax.models.wan import WanTransformer


def initialise_transformer(transformer: WanTransformer, seed: int) -> None:
    """Makes the velocity of the first frame right from the start, for a transformer with random weights.

    The first and the last layer become an orthogonal map and its transpose, and the first layer subtracts the
    latents of the first-frame condition from the noisy ones. In the first frame this difference is the
    velocity times the noise level, which the last norm divides out. A transformer that is not wide beside its
    latents takes long to find these maps by itself, and leaves the first frame grainy.

    Args:
        transformer: Changed in place.
        seed: Seed of the orthogonal map.
    """
    config, layer = transformer.config, transformer.patch_in
    places, channels = config.patch[0] * config.patch[1], config.latent_channels
    shape = (places * channels, config.dim)
    gain = (config.dim / shape[0]) ** 0.5  # tokens have the variance of latents
    maps = jax.nn.initializers.orthogonal()(jax.random.key(seed), shape)
    embedding = gain * maps.reshape(places, channels, -1)
    # Each place of a patch has the latents, the mask of the condition, and its latents.
    kernel = jnp.asarray(layer.kernel[...]).reshape(places, -1, config.dim)
    kernel = kernel.at[:, :channels].set(embedding).at[:, -channels:].set(-embedding)
    layer.kernel[...] = kernel.reshape(-1, config.dim).astype(layer.kernel.dtype)
    transformer.patch_out.kernel[...] = (maps.T / gain).astype(layer.kernel.dtype)
