"""The VAE's own promises: causal, trainable, memory that does not grow with the video's length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise, relative

from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.models.tiling import blend_tiles, tiled_decode
from fantasy_jax.models.vae import VAEConfig, WanVAE

CONFIG = VAEConfig(dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1)


@pytest.fixture(scope="module")
def vae():
    # By one compiled program: parameter by parameter it takes twenty seconds.
    return randomise(nnx.jit(lambda: WanVAE(CONFIG, rngs=nnx.Rngs(jax.random.key(0, impl="rbg"))))())


def video(frames, height=16, width=24):
    return jax.random.uniform(jax.random.key(0), (1, frames, height, width, 3), minval=-1, maxval=1)


@pytest.mark.networks
def test_the_past_does_not_see_the_future(vae):
    encode, decode = nnx.jit(lambda vae, x: vae.encode(x)), nnx.jit(lambda vae, x: vae.decode(x))
    whole = encode(vae, video(13))
    assert whole.shape == (1, 4, 2, 3, 16)
    assert relative(encode(vae, video(13)[:, :5]), whole[:, :2]) < 1e-6
    decoded = decode(vae, whole)
    assert decoded.shape == (1, 13, 16, 24, 3)
    assert relative(decode(vae, whole[:, :2]), decoded[:, :5]) < 1e-6


@pytest.mark.networks
@pytest.mark.parametrize(("frames", "height"), [(4, 16), (5, 20)])
def test_a_video_that_does_not_fit_is_an_error(vae, frames, height):
    with pytest.raises(ValueError, match=r"frames must be 4k \+ 1, sides multiples of 8"):
        vae.encode(video(frames, height))


def test_memory_does_not_grow_with_the_length(vae):
    graphdef, state = nnx.split(vae)
    encode = jax.jit(lambda state, x: nnx.merge(graphdef, state).encode(x))
    decode = jax.jit(lambda state, x: nnx.merge(graphdef, state).decode(x))

    def temporaries(function, shape):
        compiled = function.lower(state, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for function, shape in (
        (encode, lambda k: (1, 4 * k + 1, 64, 64, 3)),
        (decode, lambda k: (1, k + 1, 8, 8, 16)),
    ):
        short, long = temporaries(function, shape(4)), temporaries(function, shape(40))
        assert long < 1.1 * short, (short, long)


@pytest.mark.slow
def test_every_parameter_learns(vae):
    graphdef, params, rest = nnx.split(vae, nnx.Param, ...)

    @jax.jit
    def gradient(params):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            x = video(9)
            mean, log_variance = model.encode_moments(x)
            latents = (mean - model.latent_mean[...]) / model.latent_std[...]
            return jnp.mean((model.decode(latents) - x) ** 2) + 1e-3 * jnp.mean(log_variance**2)

        return jax.grad(loss)(params)

    nnx.update(vae, gradient(params))
    gradients = {path: np.asarray(value) for path, value in flat_parameters(vae).items()}
    nnx.update(vae, params)
    assert all(np.isfinite(value).all() for value in gradients.values())
    assert not [path for path, value in gradients.items() if not value.any()]


@pytest.mark.networks
def test_blended_tiles_of_the_identity_give_it_back():
    array = jax.random.normal(jax.random.key(0), (1, 2, 23, 40, 3))
    blended = blend_tiles(lambda x: x, array, tile=(10, 16), stride=(6, 9), grow=1)
    assert relative(blended, array) < 1e-6


@pytest.mark.networks
def test_one_tile_is_no_tile(vae):
    latents = jax.random.normal(jax.random.key(1), (1, 2, 4, 4, 16))
    decoded = nnx.jit(lambda vae, x: vae.decode(x))(vae, latents)
    assert relative(tiled_decode(vae, latents), jnp.clip(decoded, -1, 1)) < 1e-6
