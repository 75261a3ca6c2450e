"""The VAE is causal and trainable; its memory does not grow with the length of the video."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, random_network, relative

from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.miniature.convolution import convolve
from fantasy_jax.models.tiling import blend_tiles
from fantasy_jax.models.vae import VAEConfig

CONFIG = VAEConfig(dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1)


@pytest.fixture(scope="module")
def vae():
    return random_network(CONFIG)


def video(frames, height=16, width=24):
    return jax.random.uniform(jax.random.key(0), (1, frames, height, width, 3), minval=-1, maxval=1)


@pytest.mark.slow
@pytest.mark.networks
def test_encoder_and_decoder_are_causal(vae):
    encode, decode = nnx.jit(lambda vae, x: vae.encode(x)), nnx.jit(lambda vae, x: vae.decode(x))
    latents = encode(vae, video(13))
    assert latents.shape == (1, 4, 2, 3, 16)
    assert relative(encode(vae, video(13)[:, :5]), latents[:, :2]) < 1e-6
    decoded = decode(vae, latents)
    assert decoded.shape == (1, 13, 16, 24, 3)
    assert relative(decode(vae, latents[:, :2]), decoded[:, :5]) < 1e-6


@pytest.mark.networks
@pytest.mark.parametrize(("frames", "height", "message"), [(4, 16, "4k"), (5, 20, "multiples of 8")])
def test_a_video_of_another_length_or_size_is_an_error(vae, frames, height, message):
    with pytest.raises(ValueError, match=message):
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
def test_every_parameter_has_a_gradient(vae):
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
def test_blended_tiles_of_the_identity_are_the_input():
    array = normal(1, 2, 23, 40, 3, seed=0)
    blended = blend_tiles(lambda x: x, array, tile=(10, 16), stride=(6, 9), scale=1)
    assert relative(blended, array) < 1e-6


@pytest.mark.networks
@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [
        ((3, 3, 3), (1, 1, 1), [(0, 0), (1, 1), (1, 1)]),
        ((1, 3, 3), (1, 2, 2), [(0, 0), (0, 1), (0, 1)]),
        ((3, 1, 1), (2, 1, 1), "VALID"),
    ],
)
def test_the_convolution_for_cpus_equals_that_of_xla(size, strides, padding):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 6, 8, 3), (*size, 3, 4)))

    def with_gradients(function):
        def loss(x, kernel):
            result = function(x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
            return (result**2).sum(), result

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel))

    expected = with_gradients(jax.lax.conv_general_dilated)
    for found, wanted in zip(with_gradients(convolve), expected, strict=True):
        assert relative(found, wanted) < 1e-6
