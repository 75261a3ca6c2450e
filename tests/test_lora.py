"""LoRA: a new one is a no-op, merged equals unmerged, and diffusers reads the export."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY_WAN, abstract, normal, randomise, relative, run_convert_weights
from safetensors.numpy import load_file

from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.models.lora import LoRAConfig, add_lora, attach_lora, lora_of
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.sharding import make_mesh, parameter_shardings
from fantasy_jax.system.registry import component_of
from fantasy_jax.training.parameters import ALL_TRAINED, lora_layers, parameter_modes, trainable
from fantasy_jax.weights.loading import StoredLoader, load_network
from fantasy_jax.weights.lora import lora_merge
from fantasy_jax.weights.store import LORA, save_network

RULES = (("^blocks/.*kernel$", "lora"), ("", "frozen"))
SIZES = LoRAConfig(rank=4, alpha=6.0)


CONFIG = replace(TINY_WAN, dim=32, ffn_dim=48)


def base():
    return randomise(abstract(WanTransformer, CONFIG))


def adapted(trained=True):
    """The same network with a LoRA on every linear layer of its blocks; B is not zero with `trained`."""
    model = base()
    add_lora(model, lora_layers(model, RULES), SIZES, rngs=nnx.Rngs(7))
    if trained:
        lora = lora_of(model)
        for seed, product in enumerate(lora.products().values()):
            product.lora_b[...] = 0.1 * normal(*product.lora_b.shape, seed=seed)
        attach_lora(model, lora)
    return model


def velocity_of(model):
    keys, config = jax.random.split(jax.random.key(1), 4), CONFIG
    latents, first_frame = (
        jax.random.normal(key, (1, 2, 4, 4, channels))
        for key, channels in zip(keys, (config.latent_channels, config.condition_channels), strict=False)
    )
    text = jax.random.normal(keys[2], (1, 5, config.text_dim))
    image = jax.random.normal(keys[3], (1, 6, config.image_dim))
    return model(latents, first_frame, jnp.array([300.0]), model.conditions(text, image))


@nnx.jit
def velocity(model):
    with jax.default_matmul_precision("highest"):
        return velocity_of(model)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of a transformer and a LoRA."""
    folder, model = tmp_path_factory.mktemp("store"), adapted()
    save_network(folder / "transformer", model, component="wan2.1_i2v_dit")
    save_network(folder / LORA, lora_of(model), component="lora")
    return folder


def stored_transformer(store, merge_lora):
    load = StoredLoader(store, merge_lora=merge_lora)
    return load(component_of(CONFIG), CONFIG, jnp.dtype("float32"), None)


def test_a_new_lora_does_not_change_a_layer():
    x = normal(5, 7, 32, seed=0)
    layer = nnx.Linear(32, 48, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(48.0) / 7
    with_lora = nnx.Dict(layer=nnx.clone(layer))
    add_lora(with_lora, ["layer"], SIZES, rngs=nnx.Rngs(1))
    assert with_lora["layer"].dot_general.lora_a[...].any()
    assert np.array_equal(with_lora["layer"](x), layer(x))


@pytest.mark.slow
def test_a_new_lora_does_not_change_the_transformer():
    model = adapted(trained=False)
    assert len(lora_of(model).products()) == 12  # self-attention 4, cross-attention 6, MLP 2
    # Bit for bit only without jit: compiled programs may round differently.
    with jax.disable_jit():
        assert np.array_equal(velocity_of(model), velocity_of(base()))
    assert relative(velocity(model), velocity(base())) < 1e-6


def test_an_existing_lora_is_kept():
    model = adapted()
    again = nnx.clone(model)
    add_lora(again, lora_layers(again, RULES), SIZES, rngs=nnx.Rngs(8))
    pairs = zip(*(jax.tree.leaves(nnx.state(each)) for each in (model, again)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_only_the_lora_has_gradients_and_in_every_layer():
    graphdef, params, rest = nnx.split(adapted(), trainable(RULES), ...)
    assert {path[-1] for path, _ in nnx.to_flat_state(params)} == {"lora_a", "lora_b"}
    gradients = jax.jit(jax.grad(lambda p: (velocity_of(nnx.merge(graphdef, p, rest)) ** 2).mean()))(params)
    for path, gradient in nnx.to_flat_state(gradients):
        per_layer = np.abs(np.asarray(gradient[...])).reshape(3, -1).max(axis=1)
        assert (per_layer > 0).all(), path


def test_merged_equals_unmerged(store):
    merged, unmerged = (stored_transformer(store, merge_lora=merge) for merge in (True, False))
    assert lora_of(merged) is None
    assert lora_of(unmerged).config == lora_of(adapted()).config
    assert jnp.array_equal(velocity(unmerged), velocity(adapted()))
    assert relative(velocity(merged), velocity(unmerged)) < 2e-6
    assert relative(velocity(merged), velocity(base())) > 0.01


def test_diffusers_reads_the_export(store, tmp_path, capsys):
    import torch
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    def export(component, *options):
        path = tmp_path / f"{component}{len(options)}.safetensors"
        arguments = ("--weights", store, "--component", component, "--output", path)
        code, _, errors = run_convert_weights(capsys, "export", *arguments, *options)
        assert code == 0, errors
        return load_file(path)

    matrices = export(LORA)
    assert matrices["diffusion_model.blocks.2.ffn.2.lora_A.weight"].shape == (4, 48)
    theirs = _convert_non_diffusers_wan_lora_to_diffusers(
        {k: torch.from_numpy(v) for k, v in matrices.items()}
    )
    assert len(theirs) == len(matrices) == 2 * 12 * 3
    plain = export("transformer", "--layout=diffusers")
    merged = export("transformer", "--layout=diffusers", "--merge_lora")
    changed = {key for key in plain if not np.array_equal(plain[key], merged[key])}
    layers = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in theirs if "_A." in key
    }
    assert changed == {f"{layer}.weight" for layer in layers}
    for layer in layers:
        a, b = (theirs[f"transformer.{layer}.lora_{name}.weight"].numpy() for name in "AB")
        np.testing.assert_allclose(plain[f"{layer}.weight"] + b @ a, merged[f"{layer}.weight"], atol=1e-6)


def test_a_lora_of_another_model_is_an_error(store, tmp_path):
    other = replace(CONFIG, ffn_dim=64)
    model = abstract(WanTransformer, other)
    sizes = lora_of(adapted()).config
    lora = load_network(store / LORA, sizes, dtype=jnp.float32)
    with pytest.raises(ConfigError, match="blocks/mlp_in"):
        attach_lora(model, lora)
    save_network(tmp_path / LORA, lora, component="lora")
    save_network(tmp_path / "transformer", randomise(model), component="wan2.1_i2v_dit")
    with pytest.raises(WeightsError, match="blocks/mlp_"):
        load_network(tmp_path / "transformer", other, dtype=jnp.float32, merge=lora_merge(tmp_path / LORA))


def test_another_rank_is_a_config_error():
    model = adapted()
    with pytest.raises(ConfigError, match="blocks/"):
        add_lora(model, lora_layers(model, RULES), LoRAConfig(rank=8), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="rank"):
        LoRAConfig(rank=0)


def test_the_first_matching_rule_decides():
    model = nnx.eval_shape(adapted)
    found = parameter_modes(model, (("mlp_in", "trained"), ("^blocks/.*kernel$", "lora"), ("", "frozen")))
    assert found["blocks/mlp_in/kernel"] == found["blocks/mlp_in/bias"] == "trained"
    assert found["blocks/mlp_out/kernel"] == "lora"
    assert found["blocks/mlp_out/bias"] == "frozen"
    assert len(found) == len(nnx.to_flat_state(nnx.state(nnx.eval_shape(base), nnx.Param)))
    assert set(parameter_modes(model, ALL_TRAINED).values()) == {"trained"}


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ((("^blocks/", "trained"),), "image/linear_in/bias"),
        ((("^adaptors/", "trained"), ("", "frozen")), "adaptors"),
        ((("^blocks/", "lora"), ("", "frozen")), "blocks/cross_attention/image/key/bias"),
    ],
)
def test_wrong_rules_are_config_errors_of_one_line(rules, named):
    with pytest.raises(ConfigError, match=named) as error:
        lora_layers(nnx.eval_shape(base), rules)
    assert "\n" not in str(error.value)


def test_on_a_mesh_a_lora_is_sharded_like_its_kernel():
    model = nnx.eval_shape(adapted)
    specs = {
        "/".join(map(str, path)): sharding.spec
        for path, sharding in nnx.to_flat_state(
            parameter_shardings(nnx.state(model, nnx.Param), make_mesh(fsdp=2, tensor=2))
        )
    }
    for layer in ("blocks/self_attention/query", "blocks/cross_attention/text/value", "blocks/mlp_in"):
        assert specs[f"{layer}/dot_general/lora_b"][-1] == specs[f"{layer}/kernel"][-1] == "tensor"
        assert specs[f"{layer}/dot_general/lora_a"][-2] == specs[f"{layer}/kernel"][-2] == "fsdp"
    for layer in ("blocks/self_attention/out", "blocks/mlp_out"):
        assert specs[f"{layer}/dot_general/lora_a"][-2] == specs[f"{layer}/kernel"][-2] == "tensor"
        assert specs[f"{layer}/dot_general/lora_b"][-1] == specs[f"{layer}/kernel"][-1] == "fsdp"
