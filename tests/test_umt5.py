"""UMT5's encoder against the official outputs, transformers, and the shapes of the full-size file."""

import json

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
    random_network,
    randomise,
    relative,
    to_torch,
    transformers_umt5,
)
from safetensors.numpy import load_file

from fantasy_jax.convert import umt5 as table
from fantasy_jax.convert.rules import TensorSpec, assign, check, export, flat_parameters, make_plan
from fantasy_jax.models.layers import run
from fantasy_jax.models.umt5 import UMT5Config, UMT5Encoder, _position_buckets

pytestmark = pytest.mark.usefixtures("highest_precision")

TINY = UMT5Config(vocab_size=96, dim=24, dim_attn=40, dim_ffn=56, num_heads=5, num_layers=3, num_buckets=32)


def reference(folder):
    config = table.config_from_reference(json.loads((DATA / folder / "config.json").read_text()))
    return config, load_file(DATA / folder / "weights.safetensors")


def padded_batch(rng, vocab_size):
    lengths = np.array([37, 150, 1], np.int32)
    ids = rng.integers(0, vocab_size, (3, 150)).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(lengths), np.arange(150) < lengths[:, None]


@pytest.mark.networks
@pytest.mark.parametrize(
    ("folder", "limit"), [("umt5_encoder", 2e-6), ("umt5_encoder_small_activations", 2e-6)]
)
def test_parity_with_the_official_encoder(folder, limit):
    config, weights = reference(folder)
    model = abstract(UMT5Encoder, config)
    fill(model, table.official_rules(config), weights)
    arrays = load_file(DATA / folder / "activations.safetensors")
    mask = arrays["input.mask"].astype(bool)
    lengths = mask.sum(axis=1)
    assert 0 < lengths.min() < lengths.max()
    np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None])

    hidden = np.asarray(nnx.jit(lambda m, *x: m(*x))(model, jnp.asarray(arrays["input.ids"]), lengths))

    assert relative(hidden[mask], arrays["output.hidden"][mask]) < limit
    assert not hidden[~mask].any()


@pytest.mark.networks
def test_export_round_trip():
    config, weights = reference("umt5_encoder")
    model = abstract(UMT5Encoder, config)
    fill(model, table.official_rules(config), weights)
    exported = dict(export(table.official_rules(config), jax.device_get(flat_parameters(model))))
    assert exported.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(exported[key], value.astype(np.float32), err_msg=key)


@pytest.mark.networks
def test_full_size_file_matches():
    tensors = json.loads((DATA / "manifests/umt5_xxl_encoder.json").read_text())["tensors"]
    source = {key: TensorSpec(tuple(shape), np.dtype(np.float32)) for key, shape in tensors.items()}
    config = UMT5Config()
    target = flat_parameters(abstract(UMT5Encoder, config))
    plan = check(make_plan(table.official_rules(config), source, target))
    assert len(plan.entries) == len(tensors)
    assert sum(np.prod(spec.shape) for spec in target.values()) == 5_680_910_336


@pytest.mark.networks
def test_padding_is_masked():
    model = random_network(TINY, scale=0.05)
    ids, lengths, real = padded_batch(np.random.default_rng(0), TINY.vocab_size)
    encode = nnx.jit(lambda m, *x: m(*x))
    expected = encode(model, ids, lengths)
    np.testing.assert_array_equal(encode(model, jnp.where(real, ids, 7), lengths), expected)
    short = encode(model, ids[:1, :37], lengths[:1])
    assert relative(expected[0, :37], short[0]) < 2e-6


@pytest.mark.networks
def test_bfloat16_is_close_to_float32():
    small, full = random_network(TINY, scale=0.05, dtype=jnp.bfloat16), abstract(UMT5Encoder, TINY)
    assign(full, {k: np.asarray(v, np.float32) for k, v in flat_parameters(small).items()})
    ids, lengths, _ = padded_batch(np.random.default_rng(0), TINY.vocab_size)
    hidden = run(small, ids, lengths)
    assert hidden.dtype == jnp.float32
    assert relative(hidden, run(full, ids, lengths)) < 0.05


def transformers_model():
    import torch

    torch.manual_seed(0)
    return disturb(transformers_umt5(TINY).eval())


def assert_same(ours, theirs):
    import torch

    ids, lengths, real = padded_batch(np.random.default_rng(1), TINY.vocab_size)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(ids)).long(), attention_mask=torch.tensor(real).long())
    assert relative(np.asarray(run(ours, ids, lengths))[real], expected[0].numpy()[real]) < 2e-6


def test_from_transformers():
    theirs = transformers_model()
    tensors = theirs.state_dict()
    ours = abstract(UMT5Encoder, TINY)
    fill(ours, table.transformers_rules(TINY), tensors, table.ignored_keys(TINY))
    assert_same(ours, theirs)


def test_to_transformers():
    ours = randomise(abstract(UMT5Encoder, TINY), scale=0.05)
    theirs = transformers_model()
    faults = theirs.load_state_dict(to_torch(ours, table.transformers_rules(TINY)), strict=False)
    assert not faults.unexpected_keys
    assert set(faults.missing_keys) <= set(table.ignored_keys(TINY))
    assert_same(ours, theirs)


def test_position_buckets_equal_those_of_pytorch():
    import torch

    attention = transformers_model().encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(512)[None] - torch.arange(512)[:, None]
    expected = attention._relative_position_bucket(distance).numpy()
    np.testing.assert_array_equal(_position_buckets(512, TINY.num_buckets), expected)
