"""TAEW2.1's decoder equals PyTorch's, imported from files with the official key names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, relative

from fantasy_jax.models.tiny_decoder import TinyDecoderConfig
from fantasy_jax.models.vae import VAEConfig
from fantasy_jax.performance.flops import model_flops
from fantasy_jax.sharding import make_mesh, replicate, shard_module
from fantasy_jax.system.registry import component_of
from fantasy_jax.system.streaming import StreamingDecoder, decode_step
from fantasy_jax.weights.check import check_store
from fantasy_jax.weights.importer import import_weights
from fantasy_jax.weights.loading import load_network

pytestmark = pytest.mark.usefixtures("highest_precision")

SIZES = TinyDecoderConfig(latent_channels=5, widths=(12, 8, 6, 4), num_blocks=2)
SIZES_JSON = json.dumps({"latent_channels": 5, "widths": [12, 8, 6, 4], "num_blocks": 2})
GROWTH = (1, 2, 2)
"""Frames that each stage makes of one."""


def draw_tensors():
    """Random weights under TAEHV's names: a `Sequential` in which layers without weights are counted, too."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = {"encoder.0.weight": torch.zeros(4, 3, 3, 3)}

    def conv(name, inputs, outputs, size=3, *, bias=True):
        scale = (inputs * size**2) ** -0.5
        weight = torch.randn(outputs, inputs, size, size, generator=generator)
        tensors[f"{name}.weight"] = 1.4 * scale * weight
        if bias:
            tensors[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    conv("decoder.1", SIZES.latent_channels, SIZES.widths[0])
    for stage, (first, growth) in enumerate(zip((3, 8, 13), GROWTH, strict=True)):
        inputs, outputs = SIZES.widths[stage : stage + 2]
        for block in (first, first + 1):
            for layer, width in ((0, 2 * inputs), (2, inputs), (4, inputs)):
                conv(f"decoder.{block}.conv.{layer}", width, inputs)
        conv(f"decoder.{first + 3}.conv", inputs, growth * inputs, 1, bias=False)
        conv(f"decoder.{first + 4}", inputs, outputs, bias=False)
    conv("decoder.19", SIZES.widths[-1], 3)
    tensors["decoder.19.weight"] *= 0.2
    tensors["decoder.19.bias"] += 0.4  # most pixels are in [0, 1]
    return tensors


def decode_in_torch(tensors, latents):
    """TAEHV's decoder on `[T, C, h, w]`; returns `[T, 3, H, W]` in [0, 1]."""
    import torch

    functional = torch.nn.functional

    def conv(name, x):
        weight = tensors[f"{name}.weight"]
        return functional.conv2d(x, weight, tensors.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    x = conv("decoder.1", torch.tanh(latents / 3) * 3).relu()
    for first, growth in zip((3, 8, 13), GROWTH, strict=True):
        for block in (f"decoder.{first}", f"decoder.{first + 1}"):
            y = torch.cat([x, functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]], 1)
            y = conv(f"{block}.conv.2", conv(f"{block}.conv.0", y).relu()).relu()
            x = (conv(f"{block}.conv.4", y) + x).relu()
        x = functional.interpolate(x, scale_factor=2)
        grown = conv(f"decoder.{first + 3}.conv", x)
        x = conv(f"decoder.{first + 4}", grown.reshape(growth * len(x), *x.shape[1:]))
    return conv("decoder.19", x.relu()).clamp(0, 1)[3:]


@pytest.fixture(scope="module")
def tensors():
    return draw_tensors()


@pytest.fixture(scope="module", params=["pth", "safetensors"])
def decoder(request, tensors, tmp_path_factory):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("file")
    (folder / "config.json").write_text(SIZES_JSON)
    path = folder / f"taew2_1.{request.param}"
    (torch.save if request.param == "pth" else save_file)(tensors, path)
    sources = {"preview_decoder": path}
    import_weights(folder / "store", sources=sources, dtype=jnp.float32, progress=False)
    (checked,) = check_store(folder / "store")
    assert not checked.faults
    return load_network(folder / "store/preview_decoder", SIZES, dtype=jnp.float32)


def decode(decoder, latents):
    stream = StreamingDecoder(decoder, tile=latents.shape[2:4], stride=latents.shape[2:4])
    frames = [stream.decode(latents[:, index : index + 1]) for index in range(latents.shape[1])]
    return np.concatenate(frames, axis=1)


def test_a_stream_of_latents_is_decoded_as_by_pytorch(tensors, decoder):
    import torch

    latents = 2 * normal(1, 3, 4, 6, SIZES.latent_channels, seed=1)
    expected = decode_in_torch(tensors, torch.tensor(np.asarray(latents[0])).permute(0, 3, 1, 2))
    expected = 2 * expected.permute(0, 2, 3, 1).numpy() - 1
    video = decode(decoder, latents)
    assert video.shape == (1, 9, 32, 48, 3)
    assert np.mean(np.abs(expected) < 1) > 0.3  # not clamped
    assert relative(video[0], expected) < 2e-6


@pytest.mark.slow
def test_devices_share_the_rows(decoder):
    latents = normal(1, 2, 9, 4, SIZES.latent_channels, seed=2)  # nine rows: the last device has none
    expected = decode(decoder, latents)
    mesh = make_mesh(context=2, tensor=2)
    with jax.set_mesh(mesh):
        assert relative(decode(shard_module(decoder, mesh), replicate(latents)), expected) < 2e-6


@pytest.mark.slow
def test_it_has_a_twenty_fifth_of_the_operations_of_the_vae():
    def count(config):
        graphdef, state = nnx.split(component_of(config).abstract(config))
        latent = jax.ShapeDtypeStruct((1, 1, 60, 80, 16), jnp.float32)
        first = jax.eval_shape(
            lambda state, x: decode_step(nnx.merge(graphdef, state), None, x), state, latent
        )

        def decode(state, carried, latent):
            return decode_step.__wrapped__(nnx.merge(graphdef, state), carried, latent)

        return model_flops(decode, state, first[0], latent)

    assert 24 < count(VAEConfig()) / count(TinyDecoderConfig()) < 26
