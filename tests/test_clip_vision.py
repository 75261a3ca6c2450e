"""CLIP's vision tower against the official outputs, transformers, and the shapes of the full-size file."""

import json
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    DATA,
    abstract,
    disturb,
    fill,
    normal,
    random_network,
    randomise,
    relative,
    transformers_clip_vision,
)
from safetensors.numpy import load_file

from fantasy_jax.convert import clip_vision as table
from fantasy_jax.convert.rules import TensorSpec, assign, check, export, flat_parameters, make_plan
from fantasy_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from fantasy_jax.models.layers import run
from fantasy_jax.preprocessing.images import clip_image_preprocess

pytestmark = pytest.mark.usefixtures("highest_precision")

FOLDERS = ("clip_vision", "clip_vision_small_activations")
TINY = CLIPVisionConfig(image_size=42, patch_size=14, dim=32, mlp_ratio=3, num_heads=4, num_layers=4)


def reference(folder):
    config = table.config_from_reference(json.loads((DATA / folder / "config.json").read_text()))
    weights = load_file(DATA / folder / "weights.safetensors")
    model = abstract(CLIPVisionModel, config)
    fill(model, table.official_rules(config), weights, table.ignored_keys(config))
    return config, weights, model


@pytest.mark.networks
@pytest.mark.parametrize("folder", FOLDERS)
def test_parity_with_the_official_tower(folder):
    config, _, model = reference(folder)
    arrays = load_file(DATA / folder / "activations.safetensors")
    image = jnp.asarray(arrays["input.image"].transpose(0, 2, 3, 1))
    expected = arrays["output.pixel_values"].transpose(0, 2, 3, 1)

    assert relative(clip_image_preprocess(image, config.image_size), expected) < 2e-6
    encode = nnx.jit(lambda model, pixels: model(pixels))
    assert relative(encode(model, jnp.asarray(expected)), arrays["output.features"]) < 2e-6
    features = encode(model, clip_image_preprocess(image, config.image_size))
    assert relative(features, arrays["output.features"]) < 2e-6


@pytest.mark.networks
@pytest.mark.parametrize("folder", FOLDERS)
def test_export_round_trip(folder):
    config, weights, model = reference(folder)
    exported = dict(export(table.official_rules(config), jax.device_get(flat_parameters(model))))
    unused = {k for k in weights if any(fnmatchcase(k, p) for p in table.ignored_keys(config))}
    assert exported.keys() == weights.keys() - unused
    for key, value in exported.items():
        np.testing.assert_array_equal(value, weights[key].astype(np.float32), err_msg=key)


@pytest.mark.networks
def test_full_size_file_matches():
    tensors = json.loads((DATA / "manifests/clip_xlm_roberta_vit_h14.json").read_text())["tensors"]
    source = {key: TensorSpec(tuple(shape), np.dtype(np.float32)) for key, shape in tensors.items()}
    source["textual.head.0.weight"] = TensorSpec((1024, 1024), np.dtype(np.float32))
    config = CLIPVisionConfig()
    target = flat_parameters(abstract(CLIPVisionModel, config))
    ignore = table.ignored_keys(config)
    plan = check(make_plan(table.official_rules(config), source, target, ignore=ignore))
    assert len(plan.entries) + len(plan.ignored) == len(source)
    outside = {key for key in plan.ignored if not key.startswith("visual.transformer.31.")}
    assert outside == {
        *("textual.head.0.weight", "log_scale", "visual.head"),
        *("visual.post_norm.weight", "visual.post_norm.bias"),
    }


@pytest.mark.networks
def test_bfloat16_is_close_to_float32():
    small, full = random_network(TINY, scale=0.05, dtype=jnp.bfloat16), abstract(CLIPVisionModel, TINY)
    assign(full, {k: np.asarray(v, np.float32) for k, v in flat_parameters(small).items()})
    pixels = normal(2, 42, 42, 3, seed=0)
    features = run(small, pixels)
    assert features.dtype == jnp.float32
    assert relative(features, run(full, pixels)) < 0.05


def transformers_model():
    import torch

    torch.manual_seed(0)
    return disturb(transformers_clip_vision(TINY).eval())


def official_keys(model):
    """The official name of each key of transformers, with query, key and value not fused."""
    renames = {
        "vision_model.": "",
        "embeddings.class_embedding": "visual.cls_embedding",
        "embeddings.patch_embedding": "visual.patch_embedding",
        "embeddings.position_embedding.weight": "visual.pos_embedding",
        "pre_layrnorm": "visual.pre_norm",
        "post_layernorm": "visual.post_norm",
        "encoder.layers": "visual.transformer",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "self_attn": "attn",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    names = {}
    for key in model.state_dict():
        name = key
        for theirs, official in renames.items():
            name = name.replace(theirs, official)
        if not key.endswith("position_ids"):
            names[key] = name
    return names


def assert_same(ours, theirs):
    import torch

    pixels = np.random.default_rng(1).normal(size=(2, 42, 42, 3)).astype(np.float32)
    with torch.no_grad():
        channels_first = torch.tensor(pixels).permute(0, 3, 1, 2)
        expected = theirs(channels_first, output_hidden_states=True).hidden_states[-2]
    assert relative(run(ours, jnp.asarray(pixels)), expected.numpy()) < 2e-6


def test_from_transformers():
    theirs = transformers_model()
    state = {name: theirs.state_dict()[key].numpy() for key, name in official_keys(theirs).items()}
    tensors = {name: value for name, value in state.items() if "q_proj" not in name}
    for name in (name for name in state if "q_proj" in name):
        parts = [tensors.pop(name.replace("q_proj", p)) for p in ("k_proj", "v_proj")]
        tensors[name.replace("q_proj", "to_qkv")] = np.concatenate([state[name], *parts])
    tensors["visual.cls_embedding"] = tensors["visual.cls_embedding"][None, None]
    tensors["visual.pos_embedding"] = tensors["visual.pos_embedding"][None]
    ours = abstract(CLIPVisionModel, TINY)
    fill(ours, table.official_rules(TINY), tensors, table.ignored_keys(TINY))
    assert_same(ours, theirs)


def test_to_transformers():
    import torch

    ours = randomise(abstract(CLIPVisionModel, TINY), scale=0.05)
    exported = dict(export(table.official_rules(TINY), jax.device_get(flat_parameters(ours))))
    for key in [key for key in exported if "to_qkv" in key]:
        fused = exported.pop(key)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), np.split(fused, 3), strict=True):
            exported[key.replace("to_qkv", name)] = part
    theirs = transformers_model()
    state = theirs.state_dict()
    names = official_keys(theirs)
    for key, name in names.items():
        if name in exported:
            state[key] = torch.tensor(exported.pop(name)).reshape(state[key].shape)
    assert not exported
    theirs.load_state_dict(state)
    assert_same(ours, theirs)
