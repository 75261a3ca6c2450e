"""Initial weights of the small system, drawn or taken from a store."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks, RandomLoader, check_vocabulary
from fantasy_jax.system.registry import Component


def initial_networks(model: ModelConfig, *, seed: int, stored: Networks | None = None) -> Networks:
    """Networks as training begins with them: those that are stored, and random ones.

    A random transformer has the maps of `initialise_transformer`.

    Args:
        model: All sizes.
        seed: Seed of random weights.
        stored: Networks that are taken over, on one device.

    Raises:
        ConfigError: The tokenizer has more tokens than the text encoder.
    """
    check_vocabulary(model, tokenizer := byte_tokenizer())
    return Networks(model, _InitialLoader(seed, stored), lambda: tokenizer)


class _InitialLoader:
    """Takes a network over as it is, or draws its weights (a `system.networks.Loader`)."""

    def __init__(self, seed: int, stored: Networks | None):
        self.seed, self.stored = seed, stored

    def __call__(self, component: Component, config: Any, dtype: jnp.dtype, mesh: Mesh | None) -> nnx.Module:
        if self.stored is not None and component.slot in self.stored:
            return self.stored[component.slot]
        network = RandomLoader(self.seed)(component, config, dtype, mesh)
        if component.slot == "transformer":
            initialise_transformer(network, self.seed)
        return network


def initialise_transformer(transformer: WanTransformer, seed: int) -> None:
    """Makes the velocity of the first frame right from the start, for a transformer with random weights.

    The first and the last layer become an orthogonal map and its transpose, and the first layer subtracts the
    latents of the first-frame condition from the noisy ones. In the first frame this difference is the
    velocity times the noise level, which the last norm divides out. With `WanConfig.still_condition` the same
    nearly holds in later frames, where nothing moves. A transformer that is not wide beside its latents takes
    long to find these maps by itself, and leaves the first frame grainy.

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
