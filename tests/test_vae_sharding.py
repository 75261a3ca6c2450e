"""The VAE with its rows shared by devices: what one device computes, and what devices send each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise, relative
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.models.vae import CausalConv, Downsample, Upsample, VAEConfig, WanVAE
from fantasy_jax.performance.collectives import exchanges
from fantasy_jax.performance.flops import count_flops
from fantasy_jax.sharding import make_mesh, share

CONFIG = VAEConfig(
    dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), linear_shortcut=True
)
LATENT_FRAMES = 3
SQUARE, WIDE = (8, 8), (9, 15)
"""Rows and columns of latents: eight devices share eight rows evenly; of nine, three get none."""


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def vae():
    return randomise(nnx.jit(lambda: WanVAE(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg"))))())


def encode(vae, video):
    return jnp.concatenate(vae.encode_moments(video), axis=-1)


def decode(vae, latents):
    return vae.decode(latents)


WAYS = [encode, decode]


def draw(way, rows, columns, batch=1):
    shapes = {
        encode: (batch, 4 * LATENT_FRAMES - 3, 4 * rows, 4 * columns, 3),
        decode: (batch, LATENT_FRAMES, rows, columns, 16),
    }
    return np.random.default_rng(0).standard_normal(shapes[way], np.float32)


def pure(way, vae, mesh):
    graphdef, state = nnx.split(share(vae, mesh))
    return lambda state, x: way(nnx.merge(graphdef, state), x), state


@pytest.fixture(scope="module")
def on_one_device(vae):
    return functools.cache(lambda way, *size: np.asarray(nnx.jit(way)(vae, draw(way, *size))))


def sent_rows(network):
    """Rows that a device sends in a chunk: to both neighbours, or to the one above."""
    kinds = {CausalConv: 2, Upsample: 2, Downsample: 1}
    return sum(kinds.get(type(module), 0) for _, module in nnx.iter_graph(network))


@pytest.mark.parametrize("way", WAYS)
def test_devices_send_their_nearest_rows_and_gather_keys_and_values(vae, on_one_device, way):
    mesh = make_mesh(context=2, tensor=4)
    run, state = pure(way, vae, mesh)
    x = draw(way, *SQUARE)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(state, jax.device_put(x, PartitionSpec())).compile()
        result = compiled(state, jax.device_put(x, PartitionSpec()))
        assert count_flops(run, state, x) == count_flops(pure(way, vae, make_mesh())[0], state, x)
    assert relative(result, on_one_device(way, *SQUARE)) < 1e-5
    assert result.sharding.spec[2] == ("context", "tensor")
    found = exchanges(compiled.as_text())
    assert set(found) == {"all-gather", "collective-permute"}
    assert found["collective-permute"].count == LATENT_FRAMES * sent_rows(getattr(vae, f"{way.__name__}r"))
    widths = 2 * CONFIG.dim * CONFIG.dim_mult[-1]
    assert found["all-gather"].bytes == 4 * LATENT_FRAMES * SQUARE[0] * SQUARE[1] * widths


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_do_not_divide(vae, on_one_device, way):
    mesh = make_mesh(data=2, context=4)
    run, state = pure(way, vae, mesh)
    with jax.set_mesh(mesh):
        x = jax.device_put(draw(way, *WIDE, 2), NamedSharding(mesh, PartitionSpec("data")))
        assert relative(jax.jit(run)(state, x), on_one_device(way, *WIDE, 2)) < 1e-5
