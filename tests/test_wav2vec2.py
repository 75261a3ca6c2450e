"""wav2vec2 against recorded outputs, against transformers, and all naming schemes of its keys."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import DATA, abstract, fill, normal, random_network, randomise, relative, to_torch
from safetensors.numpy import load_file

from fantasy_jax.convert import wav2vec2 as table
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import TensorSpec, assign, check, export, flat_parameters, make_plan
from fantasy_jax.errors import WeightsError
from fantasy_jax.models.layers import run
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.preprocessing.audio import normalise_waveform
from fantasy_jax.system.encoders import encode_audio
from fantasy_jax.video import wav2vec2_length
from fantasy_jax.weights.detect import detect

pytestmark = pytest.mark.usefixtures("highest_precision")

FOLDERS = ("wav2vec2", "wav2vec2_large_style")
LARGE_STYLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embedding_groups": 4,
}
# The padding of an odd kernel is symmetric, that of an even one is not.
STYLES = [{"num_conv_pos_embeddings": 8}, {"num_conv_pos_embeddings": 7, **LARGE_STYLE}]
OLD_NAMES = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def fill_any(module, config, tensors):
    fill(module, table.official_rules(config, tensors), tensors, table.ignored_keys(config))


def reference(folder):
    config = table.config_from_reference(json.loads((DATA / folder / "config.json").read_text()))
    return config, load_file(DATA / folder / "weights.safetensors")


def renamed(tensors, prefix, old_weight_norm):
    names = OLD_NAMES if old_weight_norm else {}
    result = {}
    for key, value in tensors.items():
        for new, old in names.items():
            key = key.replace(new, old)
        result[prefix + key] = value
    return result


@pytest.mark.networks
@pytest.mark.parametrize("folder", FOLDERS)
def test_parity_with_transformers_outputs(folder):
    config, weights = reference(folder)
    model = abstract(Wav2Vec2Model, config)
    fill_any(model, config, weights)
    arrays = load_file(DATA / folder / "activations.safetensors")
    values = arrays["output.input_values"]

    normalised = normalise_waveform(arrays["input.waveform"][0])[None]
    assert relative(normalised, values) < 2e-6
    encode = nnx.jit(lambda model, waveform: model(waveform))
    expected = arrays["output.last_hidden_state"]
    assert relative(encode(model, jnp.asarray(values)), expected) < 2e-6
    assert relative(encode(model, jnp.asarray(normalised)), expected) < 2e-6


@pytest.mark.networks
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("prefix", ["", "wav2vec2."])
@pytest.mark.parametrize("old_weight_norm", [False, True])
def test_every_naming_scheme_round_trips(folder, prefix, old_weight_norm):
    config, weights = reference(folder)
    tensors = renamed(weights, prefix, old_weight_norm) | {"lm_head.bias": np.zeros(32, np.float16)}
    model = abstract(Wav2Vec2Model, config)
    fill_any(model, config, tensors)
    parameters = jax.device_get(flat_parameters(model))
    exported = dict(export(table.official_rules(config, tensors), parameters))
    assert tensors.keys() - exported.keys() == {"lm_head.bias", f"{prefix}masked_spec_embed"}
    for key, value in exported.items():
        np.testing.assert_array_equal(value, tensors[key].astype(np.float32), err_msg=key)


@pytest.mark.networks
def test_one_feature_every_320_samples():
    model = abstract(Wav2Vec2Model, Wav2Vec2Config(**SIZES))
    for samples in (400, 719, 720, 16_000, 56_347):
        shape = nnx.eval_shape(run, model, jnp.zeros((1, samples))).shape
        assert shape == (1, wav2vec2_length(samples), SIZES["hidden_size"])


@pytest.mark.networks
@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_is_close_to_float32(style):
    config = Wav2Vec2Config(**SIZES, **style)
    small, full = random_network(config, scale=0.05, dtype=jnp.bfloat16), abstract(Wav2Vec2Model, config)
    assign(full, {k: np.asarray(v, np.float32) for k, v in flat_parameters(small).items()})
    waveform = normal(2, 4_000, seed=0)
    encode = nnx.jit(lambda model, waveform: model(waveform))
    features = encode(small, waveform)
    assert features.dtype == jnp.float32
    assert relative(features, encode(full, waveform)) < 0.05


def transformers_model(style):
    import torch
    from transformers import Wav2Vec2Config as TheirConfig
    from transformers import Wav2Vec2Model as TheirModel

    torch.manual_seed(0)
    model = TheirModel(TheirConfig(**SIZES, **style)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_same(ours, theirs):
    import torch

    waveform = np.random.default_rng(1).normal(size=(2, 5_003)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(waveform)).last_hidden_state
    assert relative(run(ours, jnp.asarray(waveform)), expected.numpy()) < 2e-6


@pytest.mark.parametrize("style", STYLES)
def test_from_transformers(style):
    theirs = transformers_model(style)
    config = Wav2Vec2Config(**SIZES, **style)
    ours = abstract(Wav2Vec2Model, config)
    fill_any(ours, config, theirs.state_dict())
    assert_same(ours, theirs)


@pytest.mark.parametrize("style", STYLES)
def test_to_transformers(style):
    config = Wav2Vec2Config(**SIZES, **style)
    ours = randomise(abstract(Wav2Vec2Model, config), scale=0.05)
    theirs = transformers_model(style)
    faults = theirs.load_state_dict(to_torch(ours, table.official_rules(config)), strict=False)
    assert not faults.unexpected_keys
    assert faults.missing_keys == ["masked_spec_embed"]
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 94_371_712),
        (
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            }
            | LARGE_STYLE,
            315_438_720,
        ),
    ],
    ids=["base-960h", "large"],
)
def test_full_size_matches_transformers(sizes, count):
    import torch
    from transformers import Wav2Vec2Config as TheirConfig
    from transformers import Wav2Vec2Model as TheirModel

    with torch.device("meta"):
        state = TheirModel(TheirConfig(**sizes)).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == count
    source = {key: TensorSpec(tuple(t.shape), np.dtype(np.float32)) for key, t in state.items()}
    config = Wav2Vec2Config(**sizes)
    target = flat_parameters(abstract(Wav2Vec2Model, config))
    check(make_plan(table.official_rules(config, state), source, target, ignore=table.ignored_keys(config)))
    masked_spec_embed = config.hidden_size  # replaces features in training only
    assert sum(np.prod(spec.shape) for spec in target.values()) == count - masked_spec_embed


# Folders as they are downloaded


@pytest.mark.parametrize(
    ("settings", "changes", "nested"),
    [
        ({}, {"do_normalize": False}, False),
        ({"hidden_act": "relu"}, {"do_normalize": False}, True),
        (
            {"hidden_act": "gelu_new", "feat_extract_activation": "silu", "layer_norm_eps": 1e-3},
            {"do_normalize": True},
            False,
        ),
    ],
)
def test_a_folder_of_wav2vec2(tmp_path, settings, changes, nested):
    """The features of transformers, from the folder that transformers writes."""
    import torch
    import transformers

    sizes = json.loads((DATA / "wav2vec2/config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim")
    names += ("num_conv_pos_embeddings", "num_conv_pos_embedding_groups")
    config = transformers.Wav2Vec2Config(**{name: sizes[name] for name in names}, **settings)
    torch.manual_seed(0)
    model = transformers.Wav2Vec2Model(config).eval()
    model.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(**changes)
    extractor.save_pretrained(tmp_path)
    if nested:
        file = tmp_path / "preprocessor_config.json"
        content = {"feature_extractor": json.loads(file.read_text()), "processor_class": "Wav2Vec2Processor"}
        (tmp_path / "processor_config.json").write_text(json.dumps(content))
        file.unlink()
    # fairseq's own checkpoint lies beside it in the published folders.
    torch.save({"args": None, "model": {"w2v_encoder.proj.weight": torch.ones(2)}}, tmp_path / "xlsr.pt")
    waveform = (0.1 + 0.3 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)
    values = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = model(values).last_hidden_state.numpy()
    (found,) = detect(open_weights(tmp_path))
    assert relative(encode_audio(found.load(), waveform), expected) < 5e-6


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [("config.json", "hidden_act", "mish"), ("preprocessor_config.json", "sampling_rate", 8000)],
)
def test_a_wav2vec2_that_is_not_supported(tmp_path, file, name, value):
    shutil.copytree(DATA / "wav2vec2", tmp_path / "w")
    path = tmp_path / "w" / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {name: value}))
    with pytest.raises(WeightsError, match=f"{name} .*{value}"):
        detect(open_weights(tmp_path / "w"))
