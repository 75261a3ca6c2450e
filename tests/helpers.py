"""References, small models with random parameters, and measures of difference, for several tests."""

import resource
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import (
    Parameter,
    Rule,
    TensorSpec,
    assign,
    export,
    flat_parameters,
    load,
    make_plan,
    stored_dtype,
)
from fantasy_jax.diffusion.guidance import GuidanceBranch
from fantasy_jax.models import layers
from fantasy_jax.models.adapters.audio import AudioAdapterConfig
from fantasy_jax.models.adapters.expression import ExpressionAdapterConfig
from fantasy_jax.models.clip_vision import CLIPVisionConfig
from fantasy_jax.models.perceiver import ResamplerConfig
from fantasy_jax.models.umt5 import UMT5Config
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.system.registry import component_of
from fantasy_jax.weights.detect import detect

DATA = Path(__file__).parent / "data"
REFERENCES = (
    "fantasytalking_dit",
    "wan_vae",
    "umt5_encoder",
    "clip_vision",
    "wav2vec2",
    "wav2vec2_large_style",
    "pdfgc_motion_encoder",
    "fantasyportrait_dit",
)
"""Every kind of network."""

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
TINY_EXPRESSION = ExpressionAdapterConfig(
    head_width=3,
    eye_width=3,
    emotion_width=5,
    mouth_width=12,
    token_width=16,
    resampler=ResamplerConfig(dim=16, depth=2, num_heads=2, head_dim=4, mlp_ratio=2),
    mouth_queries=3,
    emotion_queries=2,
    width=48,
    num_heads=2,
    num_layers=3,
)


def tiny_transformer(config: WanConfig = TINY_WAN, **adapters) -> WanTransformer:
    """A small transformer with these adapters, by name; all of its parameters are random and none is zero."""
    return randomise(abstract(WanTransformer, config, adapters=adapters))


def abstract(network, *sizes, **types) -> nnx.Module:
    """A network without memory for its parameters."""
    return layers.abstract(lambda rngs: network(*sizes, rngs=rngs, **types))


def tiny_inputs(
    config: WanConfig = TINY_WAN, batch: int = 2, size: tuple[int, int, int] = (3, 4, 6), **adapters
) -> tuple[jax.Array, ClipInputs]:
    """Random noise, and random inputs of clips.

    Args:
        config: Sizes of the transformer.
        batch: Clips.
        size: Latent frames, rows and columns.
        adapters: Shapes of one clip's inputs of adapters, by name.
    """
    shapes = {
        "noise": (*size, config.latent_channels),
        "first_frame": (*size, config.condition_channels),
        "text": (5, config.text_dim),
        "negative_text": (3, config.text_dim),
        "image": (9, config.image_dim),
    }
    noise, *base = (normal(batch, *shape, seed=seed) for seed, shape in enumerate(shapes.values()))
    features = {
        name: normal(batch, *shape, seed=10 + seed) for seed, (name, shape) in enumerate(adapters.items())
    }
    return noise, ClipInputs(*base, features)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Normally distributed numbers, float32; NumPy draws them, as JAX compiles a program for each shape."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32))


def only_branch(index: int) -> tuple[GuidanceBranch, ...]:
    """The three branches of FantasyTalking's guidance in one step, all weight on one of them."""
    groups = (("text", "audio"), ("audio",), ())
    return tuple(GuidanceBranch(dropped, (float(i == index),)) for i, dropped in enumerate(groups))


def run_convert_weights(capsys, *arguments) -> tuple[int, str, str]:
    """Runs `convert_weights.py` in this process; returns exit code, standard output and standard error."""
    import convert_weights
    from fantasy_jax import cli

    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: convert_weights.main([str(x) for x in arguments]), "convert_weights.py")
    return stopped.value.code, *capsys.readouterr()


def relative(value, reference) -> float:
    """Norm of the difference over norm of the reference."""
    value, reference = (np.asarray(x, np.float64) for x in (value, reference))
    assert value.shape == reference.shape
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def as_float32(value: np.ndarray) -> np.ndarray:
    """A tensor as a float32 network exports it; integers keep their dtype."""
    return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)


def randomise(module: nnx.Module, seed: int = 0, scale: float = 0.15) -> nnx.Module:
    """Makes every parameter random and different from zero, in place; scales and variances are near one."""
    assign(module, _random_values(module, seed, scale))
    return module


def random_network(config, seed: int = 0, scale: float = 0.15, dtype=jnp.float32) -> nnx.Module:
    """The network with these sizes, every parameter random and different from zero."""
    component = component_of(config)
    module = component.abstract(config, dtype)
    dtypes = {path: stored_dtype(spec, dtype) for path, spec in flat_parameters(module).items()}
    values = _random_values(module, seed, scale)
    return component.build(config, dtype, {path: x.astype(dtypes[path]) for path, x in values.items()})


def small_networks(model: ModelConfig) -> Networks:
    """All networks of a model, as `random_network` makes them: initial weights would be zero in part."""

    def load(component, config, dtype, mesh):
        return random_network(config, scale=0.1, dtype=dtype)

    return Networks(model, load, byte_tokenizer, keep="all")


def _random_values(module: nnx.Module, seed: int, scale: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def draw(path: str, spec: Parameter) -> np.ndarray:
        if np.issubdtype(spec.dtype, np.integer):
            return random.integers(1, 1000, spec.shape, spec.dtype)
        around = path.endswith(("scale", "var"))
        return (scale * random.standard_normal(spec.shape) + around).astype(np.float32)

    return {path: np.asarray(draw(path, spec)) for path, spec in sorted(flat_parameters(module).items())}


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
    modules = {found.component.name: found.load(dtype) for found in detect(open_weights(DATA / name))}
    transformer = modules["wan2.1_i2v_dit"]
    transformer.adapters["audio"] = modules["fantasytalking"]
    return transformer


def reference_inputs(name: str = "fantasytalking_dit") -> dict[str, jax.Array]:
    """Inputs of the reference, latents channels last."""
    return {key: jnp.asarray(value) for key, value in _activations(name, "input.").items()}


def reference_outputs(name: str = "fantasytalking_dit") -> dict[str, np.ndarray]:
    """Outputs of the reference, latents channels last."""
    return _activations(name, "output.")


def reference_conditions(
    model: WanTransformer, inputs: dict, *, text: str = "text", scale=1.0, attention: str = "frame"
):
    """The conditions of the reference's transformer."""
    num_frames = 4 * inputs["latents"].shape[1] - 3
    adapter, features = model.adapters["audio"], inputs["audio_features"]
    audio = adapter.condition(features, num_frames, scale=scale, attention=attention)
    return model.conditions(inputs[text], inputs["clip_features"]) | {"audio": audio}


def layer(stack: nnx.Module, index: int) -> nnx.Module:
    """One layer of a stack."""
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], state))


def transformers_umt5(config: UMT5Config):
    """transformers' UMT5 encoder of these sizes."""
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
    """transformers' CLIP image encoder of these sizes."""
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
    """Adds noise to all parameters of a PyTorch module in place, so that none is zero or one."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _activations(name: str, prefix: str) -> dict[str, np.ndarray]:
    file = open_weights(DATA / name / "activations.safetensors")
    arrays = {key.removeprefix(prefix): np.array(file.read(key)) for key in file.specs if prefix in key}
    return {key: np.moveaxis(x, 1, -1) if x.ndim == 5 else x for key, x in arrays.items()}


@contextmanager
def full_disk(size):
    """Files cannot become larger than this, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def damage_record(folder: Path, split: str, content: bytes) -> None:
    """Changes a byte in the record of a split's only shard that holds these bytes."""
    (shard,) = folder.glob(f"*-{split}.array_record*")
    written = bytearray(shard.read_bytes())
    # Headers between the blocks of the file may divide the content: a part of it is looked for.
    parts = (content[start : start + 32] for start in range(0, len(content), 32))
    written[next(position for part in parts if (position := written.find(part)) >= 0)] ^= 1
    shard.write_bytes(written)
