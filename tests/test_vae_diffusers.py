"""Parity with the Wan VAE of diffusers, per layer and as a whole, with the weights of either.

Without PyTorch these tests fail; they are not skipped.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fill, random_network, randomise, relative, to_torch

from fantasy_jax.convert import vae as vae_table
from fantasy_jax.models.vae import VAEConfig

pytestmark = [
    pytest.mark.usefixtures("highest_precision"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

VAE_CONFIG = VAEConfig(dim=8)


def new_vae():
    """Our VAE, whose parameters are replaced."""
    return random_network(VAE_CONFIG)


def torch_vae():
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=VAE_CONFIG.dim, z_dim=16).eval()
    # PyTorch's default weights make such a narrow decoder ill-conditioned: in float32 both programs then
    # differ by 1.4e-6 and 2.1e-6 from float64.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + name.endswith("gamma"))
    return model


@pytest.fixture(scope="module")
def vaes():
    ours = randomise(new_vae(), scale=0.1)
    theirs = torch_vae()
    theirs.load_state_dict(to_torch(ours, vae_table.diffusers_rules(VAE_CONFIG)), strict=True)
    return ours, theirs


def video():
    return np.random.default_rng(0).uniform(-1, 1, (1, 9, 32, 48, 3)).astype(np.float32)


def check_vae(ours, theirs):
    import torch

    first = torch.from_numpy(np.moveaxis(video(), -1, 1).copy())
    with torch.no_grad():
        posterior = theirs.encode(first).latent_dist
        mean, log_variance = nnx.jit(lambda vae, x: vae.encode_moments(x))(ours, jnp.asarray(video()))
        assert relative(np.moveaxis(np.asarray(mean), -1, 1), posterior.mean) < 2e-6
        # diffusers clamps the log variance to [-30, 20]; it does not reach these limits here.
        assert relative(np.moveaxis(np.asarray(log_variance), -1, 1), posterior.logvar) < 2e-6
        # Normalised latents, as the transformer generates them; diffusers takes them without normalisation.
        latents = np.random.default_rng(1).standard_normal((1, 3, 4, 6, 16)).astype(np.float32)
        original = latents * np.asarray(ours.latent_std) + np.asarray(ours.latent_mean)
        decoded = theirs.decode(torch.from_numpy(np.moveaxis(original, -1, 1).copy())).sample
    clamped = np.clip(
        np.asarray(nnx.jit(lambda vae, x: vae.decode(x))(ours, jnp.asarray(latents))), -1, 1
    )  # diffusers clamps decoded videos
    assert relative(np.moveaxis(clamped, -1, 1), decoded) < 2e-6


@pytest.mark.slow
def test_our_weights_in_diffusers(vaes):
    check_vae(*vaes)


@pytest.mark.slow
def test_weights_of_diffusers_in_ours():
    theirs = torch_vae()
    ours = fill(new_vae(), vae_table.diffusers_rules(VAE_CONFIG), theirs.state_dict())
    check_vae(ours, theirs)


def test_every_layer(vaes):
    import torch

    from fantasy_jax.models.halo import Rows
    from fantasy_jax.models.vae import CausalConvCache, Downsample, Upsample

    ours, theirs = vaes
    coders = (
        (ours.encoder.layers, [*theirs.encoder.down_blocks, *middle(theirs.encoder)]),
        (ours.decoder.layers, [*middle(theirs.decoder), *flat_up_blocks(theirs.decoder)]),
    )
    for layers, expected_layers in coders:
        assert len(layers) == len(expected_layers)
        for layer, expected_layer in zip(layers, expected_layers, strict=True):
            width = channels(layer)
            x = np.random.default_rng(0).standard_normal((1, 1, 8, 12, width)).astype(np.float32)
            with torch.no_grad():
                cached = isinstance(layer, (Downsample, Upsample))
                given = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
                expected = expected_layer(given, [None] * 4, [0]) if cached else expected_layer(given)
            mine = layer(jnp.asarray(x), CausalConvCache(None, Rows()))
            assert relative(np.moveaxis(np.asarray(mine), -1, 1), expected) < 2e-6, layer


def middle(coder):
    block = coder.mid_block
    return [block.resnets[0], block.attentions[0], block.resnets[1]]


def flat_up_blocks(decoder):
    for block in decoder.up_blocks:
        yield from block.resnets
        yield from block.upsamplers or ()


def channels(layer):
    from fantasy_jax.models.vae import AttentionBlock, ResidualBlock

    if isinstance(layer, ResidualBlock):
        return layer.norm1.scale.shape[0]
    return layer.norm.scale.shape[0] if isinstance(layer, AttentionBlock) else layer.conv.kernel.shape[-2]
