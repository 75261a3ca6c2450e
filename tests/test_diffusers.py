"""Parity with diffusers' Wan transformer and VAE, layer by layer and whole, weights going both ways.

Without PyTorch these tests fail; they are not skipped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fill, randomise, relative, to_torch

from fantasy_jax.convert import vae as vae_table
from fantasy_jax.convert import wan as wan_table
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.models.rope import rotary_table
from fantasy_jax.models.vae import VAEConfig, WanVAE
from fantasy_jax.models.wan import WanConfig, WanTransformer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# diffusers tells picture from text by the number 512, and makes the timestep's sinusoid in float32.
CONFIG = WanConfig(
    dim=96,
    ffn_dim=160,
    frequency_dim=32,
    text_dim=40,
    text_length=512,
    image_dim=64,
    num_heads=4,
    num_layers=3,
)
VAE_CONFIG = VAEConfig(dim=8)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def torch_transformer():
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.dim // CONFIG.num_heads,
        in_channels=36,
        out_channels=16,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.frequency_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        image_dim=CONFIG.image_dim,
        added_kv_proj_dim=CONFIG.dim,
    )
    return model.eval()


@pytest.fixture(scope="module")
def transformers():
    """Ours with random weights, and diffusers' with the same."""
    with jax.default_matmul_precision("highest"):
        ours = randomise(WanTransformer(CONFIG, rngs=nnx.Rngs(0)))
    theirs = torch_transformer()
    theirs.load_state_dict(to_torch(ours, wan_table.diffusers_rules(CONFIG)), strict=True)
    return ours, theirs


def inputs():
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "latents": draw(1, 3, 6, 10, 16),
        "first_frame": draw(1, 3, 6, 10, 20),
        "timestep": np.array([417.5], np.float32),
        "text": draw(1, 512, CONFIG.text_dim),
        "image": draw(1, 257, CONFIG.image_dim),
    }


def run_ours(model, x):
    x = {name: jnp.asarray(value) for name, value in x.items()}
    conditions = model.conditions(x["text"], x["image"])
    return np.asarray(model(x["latents"], x["first_frame"], x["timestep"], conditions))


def run_theirs(model, x):
    import torch

    hidden = np.concatenate([x["latents"], x["first_frame"]], axis=-1)
    with torch.no_grad():
        velocity = model(
            torch.from_numpy(np.moveaxis(hidden, -1, 1).copy()),
            torch.from_numpy(x["timestep"]),
            torch.from_numpy(x["text"]),
            torch.from_numpy(x["image"]),
            return_dict=False,
        )[0]
    return np.moveaxis(velocity.numpy(), 1, -1)


def test_transformer_our_weights_in_diffusers(transformers):
    ours, theirs = transformers
    assert relative(run_ours(ours, inputs()), run_theirs(theirs, inputs())) < 5e-6


def test_transformer_diffusers_weights_in_ours():
    theirs = torch_transformer()
    ours = WanTransformer(CONFIG, rngs=nnx.Rngs(1))
    fill(ours, wan_table.diffusers_rules(CONFIG), theirs.state_dict())
    assert relative(run_ours(ours, inputs()), run_theirs(theirs, inputs())) < 5e-6


def test_transformer_layer_by_layer(transformers):
    import torch

    ours, theirs = transformers
    x = inputs()
    text, image = torch.from_numpy(x["text"]), torch.from_numpy(x["image"])
    with torch.no_grad():
        _, modulation, text, image = theirs.condition_embedder(torch.from_numpy(x["timestep"]), text, image)
        conditions = ours.conditions(jnp.asarray(x["text"]), jnp.asarray(x["image"]))
        assert relative(conditions["text"].tokens, text) < 2e-6
        assert relative(conditions["image"].tokens, image) < 2e-6

        # Block by block, from the same input; theirs has frames before space.
        frames, rows, columns = 3, 3, 5
        hidden = np.random.default_rng(1).standard_normal((1, rows * columns, frames, CONFIG.dim), np.float32)
        flat = torch.from_numpy(hidden.transpose(0, 2, 1, 3).reshape(1, -1, CONFIG.dim).copy())
        rotary = theirs.rope(torch.zeros(1, 36, frames, 2 * rows, 2 * columns))
        context = torch.cat([image, text], dim=1)
        graphdef, state = nnx.split(ours.blocks)
        tables = rotary_table(frames, rows, columns, CONFIG.dim // CONFIG.num_heads)
        for i, block in enumerate(theirs.blocks):
            expected = block(flat, context, modulation.unflatten(1, (6, -1)), rotary)
            mine = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))(
                jnp.asarray(hidden),
                jnp.asarray(modulation.numpy()).reshape(1, 6, -1),
                tables,
                rows * columns,
                conditions,
                {},
            )
            expected = expected.numpy().reshape(1, frames, rows * columns, -1).transpose(0, 2, 1, 3)
            assert relative(mine, expected) < 2e-6


def test_transformer_both_spellings_fill_the_same_parameters(transformers):
    ours, _ = transformers
    official = to_torch(ours, wan_table.official_rules(CONFIG))
    again = fill(WanTransformer(CONFIG, rngs=nnx.Rngs(1)), wan_table.official_rules(CONFIG), official)
    for path, value in flat_parameters(ours).items():
        assert np.array_equal(value, flat_parameters(again)[path]), path


def torch_vae():
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=VAE_CONFIG.dim, z_dim=16).eval()
    # PyTorch's own first weights make so narrow a decoder ill-conditioned: in float32 both programs are then
    # 1.4e-6 and 2.1e-6 away from float64.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + name.endswith("gamma"))
    return model


@pytest.fixture(scope="module")
def vaes():
    ours = randomise(WanVAE(VAE_CONFIG, rngs=nnx.Rngs(0)), scale=0.1)
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
        mean, log_variance = ours.encode_moments(jnp.asarray(video()))
        assert relative(np.moveaxis(np.asarray(mean), -1, 1), posterior.mean) < 2e-6
        # diffusers clamps the logarithm to [-30, 20], which these weights do not reach.
        assert relative(np.moveaxis(np.asarray(log_variance), -1, 1), posterior.logvar) < 2e-6
        # Normalised latents of size one, as the transformer makes them; diffusers takes them unnormalised.
        latents = np.random.default_rng(1).standard_normal((1, 3, 4, 6, 16)).astype(np.float32)
        original = latents * np.asarray(ours.latent_std) + np.asarray(ours.latent_mean)
        decoded = theirs.decode(torch.from_numpy(np.moveaxis(original, -1, 1).copy())).sample
    clamped = np.clip(
        np.asarray(ours.decode(jnp.asarray(latents))), -1, 1
    )  # diffusers clamps what it decodes
    assert relative(np.moveaxis(clamped, -1, 1), decoded) < 2e-6


def test_vae_our_weights_in_diffusers(vaes):
    check_vae(*vaes)


def test_vae_diffusers_weights_in_ours():
    theirs = torch_vae()
    ours = fill(
        WanVAE(VAE_CONFIG, rngs=nnx.Rngs(1)), vae_table.diffusers_rules(VAE_CONFIG), theirs.state_dict()
    )
    check_vae(ours, theirs)


def test_vae_layer_by_layer(vaes):
    import torch

    from fantasy_jax.models.vae import Downsample, FrameMemory, Upsample

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
            mine = layer(jnp.asarray(x), FrameMemory(None))
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
