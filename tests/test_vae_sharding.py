"""The VAE with sharded rows gives the results of one device, by the expected collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_network, relative
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.miniature.vae import MiniatureVAEConfig
from fantasy_jax.models.vae import CausalConv, Downsample, Upsample, VAEConfig
from fantasy_jax.performance.collectives import collectives
from fantasy_jax.performance.flops import model_flops
from fantasy_jax.sharding import make_mesh, shard_module

pytestmark = pytest.mark.usefixtures("highest_precision")

SIZES = {"dim": 4, "dim_mult": (1, 2, 2), "num_res_blocks": 1, "temporal_downsample": (True, True)}
CONFIG, MINIATURE = VAEConfig(**SIZES), MiniatureVAEConfig(**SIZES, patch=2, overlap=1, refiner=8)
LATENT_FRAMES = 3
SQUARE, WIDE = (8, 8), (9, 15)
"""Rows and columns of latents: eight rows are divisible by eight devices; of nine, three devices get none."""


@pytest.fixture(scope="module")
def vae():
    return random_network(CONFIG)


def encode(vae, video):
    return jnp.concatenate(vae.encode_moments(video), axis=-1)


def decode(vae, latents):
    return vae.decode(latents)


FUNCTIONS = [encode, decode]


def draw(function, rows, columns, batch=1):
    shapes = {
        encode: (batch, 4 * LATENT_FRAMES - 3, 4 * rows, 4 * columns, 3),
        decode: (batch, LATENT_FRAMES, rows, columns, 16),
    }
    return np.random.default_rng(0).standard_normal(shapes[function], np.float32)


def pure(function, vae, mesh):
    graphdef, state = nnx.split(shard_module(vae, mesh))
    return lambda state, x: function(nnx.merge(graphdef, state), x), state


@pytest.fixture(scope="module")
def on_one_device(vae):
    return functools.cache(lambda function, *size: np.asarray(nnx.jit(function)(vae, draw(function, *size))))


def sent_rows(network):
    """Number of rows that a device sends per chunk: to both neighbours, or to the previous one only."""
    kinds = {CausalConv: 2, Upsample: 2, Downsample: 1}
    return sum(kinds.get(type(module), 0) for _, module in nnx.iter_graph(network))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_collectives_are_the_nearest_rows_and_keys_and_values(vae, on_one_device, function):
    mesh = make_mesh(context=2, tensor=4)
    run, state = pure(function, vae, mesh)
    x = draw(function, *SQUARE)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(state, jax.device_put(x, PartitionSpec())).compile()
        result = compiled(state, jax.device_put(x, PartitionSpec()))
        assert model_flops(run, state, x) == model_flops(pure(function, vae, make_mesh())[0], state, x)
    assert relative(result, on_one_device(function, *SQUARE)) < 1e-5
    assert result.sharding.spec[2] == ("context", "tensor")
    found = collectives(compiled.as_text())
    assert set(found) == {"all-gather", "collective-permute"}
    network = vae.encoder if function is encode else vae.decoder
    assert found["collective-permute"].count == LATENT_FRAMES * sent_rows(network)
    widths = 2 * CONFIG.dim * CONFIG.dim_mult[-1]
    assert found["all-gather"].bytes == 4 * LATENT_FRAMES * SQUARE[0] * SQUARE[1] * widths


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_rows_that_are_not_divisible(vae, on_one_device, function):
    mesh = make_mesh(data=2, context=4)
    run, state = pure(function, vae, mesh)
    with jax.set_mesh(mesh):
        x = jax.device_put(draw(function, *WIDE, 2), NamedSharding(mesh, PartitionSpec("data")))
        assert relative(jax.jit(run)(state, x), on_one_device(function, *WIDE, 2)) < 1e-5


@pytest.mark.slow
def test_the_vae_of_the_miniature_on_a_mesh():
    vae, mesh = random_network(MINIATURE), make_mesh(context=4)
    video = np.random.default_rng(0).standard_normal((1, 5, 72, 16, 3)).astype(np.float32)

    def reconstruct(vae, video):
        return vae.decode(vae.encode(video))

    expected = nnx.jit(reconstruct)(vae, video)
    run, state = pure(reconstruct, vae, mesh)
    with jax.set_mesh(mesh):
        result = jax.jit(run)(state, jax.device_put(video, PartitionSpec()))
    assert relative(result, expected) < 1e-5
