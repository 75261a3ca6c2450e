"""What several tests need: references, random parameters, and how far two arrays are apart."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.convert.components import recognise
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import (
    Rule,
    TensorSpec,
    assign,
    export,
    flat_parameters,
    load,
    make_plan,
)
from fantasy_jax.models.adapters.audio import AudioAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.wan import WanConfig, WanTransformer

DATA = Path(__file__).parent / "data"
REFERENCES = (
    "fantasytalking_dit",
    "wan_vae",
    "umt5_encoder",
    "clip_vision",
    "wav2vec2",
    "wav2vec2_large_style",
)
"""One of each kind of network."""

TINY_WAN = WanConfig(
    dim=48,
    ffn_dim=80,
    frequency_dim=32,
    text_dim=24,
    text_length=8,
    image_dim=20,
    num_heads=2,
    num_layers=3,
)
TINY_AUDIO = AudioAdapterConfig(feature_width=12, token_width=16, width=48, num_heads=2, num_layers=3)


def run_convert_weights(capsys, *arguments) -> tuple[int, str, str]:
    """The command as users have it: exit code, standard output, standard error."""
    import convert_weights
    from fantasy_jax import cli

    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: convert_weights.main([str(x) for x in arguments]), "convert_weights.py")
    return exit_.value.code, *capsys.readouterr()


def relative(value, reference) -> float:
    """Norm of the difference over norm of the reference."""
    value, reference = (np.asarray(x, np.float64) for x in (value, reference))
    assert value.shape == reference.shape
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def randomise(module: nnx.Module, seed: int = 0, scale: float = 0.15) -> nnx.Module:
    """Makes every parameter random, so that none is zero and none equal by chance; scales stay around one."""
    random = np.random.default_rng(seed)
    values = {
        path: (scale * random.standard_normal(value.shape) + path.endswith("scale")).astype(np.float32)
        for path, value in sorted(flat_parameters(module).items())
    }
    assign(module, values)
    return module


def fill(module: nnx.Module, rules: list[Rule], tensors: dict, ignore=()) -> nnx.Module:
    """Loads PyTorch tensors, all of them, into a module."""
    arrays = {key: np.asarray(tensor) for key, tensor in tensors.items()}
    specs = {key: TensorSpec(value.shape, value.dtype) for key, value in arrays.items()}
    plan = make_plan(rules, specs, flat_parameters(module), ignore=ignore)
    assign(module, load(plan, arrays.__getitem__))
    return module


def to_torch(module: nnx.Module, rules: list[Rule]) -> dict:
    """A module's parameters as PyTorch's state dict."""
    import torch

    values = {path: np.asarray(value) for path, value in flat_parameters(module).items()}
    return {key: torch.from_numpy(np.array(value)) for key, value in export(rules, values)}


def reference_transformer(name: str = "fantasytalking_dit", dtype=jnp.float32) -> WanTransformer:
    """The reference's transformer with its audio adapter."""
    modules = {found.component.name: found.load(dtype) for found in recognise(open_weights(DATA / name))}
    transformer = modules["wan2.1_i2v_dit"]
    transformer.adapters["audio"] = modules["fantasytalking"]
    return transformer


def reference_inputs(name: str = "fantasytalking_dit") -> dict[str, jax.Array]:
    """Inputs of the reference, latents channels last."""
    return {key: jnp.asarray(value) for key, value in _activations(name, "input.").items()}


def reference_outputs(name: str = "fantasytalking_dit") -> dict[str, np.ndarray]:
    """Outputs of the reference, latents channels last."""
    return _activations(name, "output.")


def reference_conditions(model: WanTransformer, inputs: dict, *, text: str = "text", scale=1.0, clip=False):
    """What the reference's transformer listens to; audio by frame, or by clip."""
    conditions = model.conditions(inputs[text], inputs["clip_features"])
    adapter, features = model.adapters["audio"], inputs["audio_features"]
    num_frames = 4 * inputs["latents"].shape[1] - 3
    audio = (
        adapter.clip_level(features, num_frames, scale=scale)
        if clip
        else adapter.frame_level(features, num_frames, scale=scale)
    )
    return conditions | {"audio": audio}


def layer(stack: nnx.Module, index: int) -> nnx.Module:
    """One of stacked layers."""
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], state))


def transformers_umt5(config: UMT5Config):
    """transformers' encoder of these sizes."""
    from transformers import UMT5Config as TheirConfig
    from transformers import UMT5EncoderModel

    return UMT5EncoderModel(
        TheirConfig(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.dim_attn // config.num_heads,
            d_ff=config.dim_ffn,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            feed_forward_proj="gated-gelu",
        )
    )


def transformers_clip_vision(config: CLIPVisionConfig):
    """transformers' tower of these sizes."""
    from transformers import CLIPVisionConfig as TheirConfig
    from transformers import CLIPVisionModel

    return CLIPVisionModel(
        TheirConfig(
            hidden_size=config.dim,
            intermediate_size=config.dim * config.mlp_ratio,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
        )
    )


def disturb(model):
    """Moves all parameters of a PyTorch module off their initial values; gives the module."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _activations(name: str, prefix: str) -> dict[str, np.ndarray]:
    file = open_weights(DATA / name / "activations.safetensors")
    arrays = {key.removeprefix(prefix): np.array(file.read(key)) for key in file.specs if prefix in key}
    return {key: np.moveaxis(x, 1, -1) if x.ndim == 5 else x for key, x in arrays.items()}
