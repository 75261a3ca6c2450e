"""LoRA: adding it changes nothing, merged equals apart, and other programs read what is exported."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise, relative, run_convert_weights
from safetensors.numpy import load_file

from configs import tiny
from fantasy_jax.config import ConfigError, build
from fantasy_jax.convert.files import WeightsError
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.lora import LoRAConfig, add_lora, attach_lora, lora_of
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import ModelConfig
from fantasy_jax.sharding import make_mesh, parameter_shardings
from fantasy_jax.training.parameters import EVERYTHING, lora_layers, trained, treatments
from fantasy_jax.weights import LORA, StoredNetworks, load_network, save_network

RULES = (("^blocks/.*kernel$", "lora"), ("", "frozen"))
SIZES = LoRAConfig(rank=4, alpha=6.0)


def model_config():
    """The miniature's, narrower."""
    config = build(ModelConfig, tiny.get_config().model, "model")
    sizes = {"num_heads": 2, "num_layers": 3}
    return replace(
        config,
        transformer=replace(config.transformer, dim=32, ffn_dim=48, **sizes),
        audio_adapter=replace(config.audio_adapter, width=32, **sizes),
        identity_adapter=None,
        motion_adapter=None,
    )


CONFIG = model_config()


def base():
    return randomise(nnx.eval_shape(lambda: WanTransformer(CONFIG.transformer, rngs=nnx.Rngs(0))))


def adapted(learnt=True):
    """The same with a LoRA beside every linear layer of its blocks."""
    model = base()
    add_lora(model, lora_layers(model, RULES), SIZES, rngs=nnx.Rngs(7))
    if learnt:
        lora = lora_of(model)
        for seed, product in enumerate(lora.products().values()):
            product.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(seed), product.lora_b.shape)
        attach_lora(model, lora)
    return model


def velocity_of(model):
    keys, config = jax.random.split(jax.random.key(1), 4), CONFIG.transformer
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
    """A store of a transformer, its audio adapter and a LoRA; what the transformer is without."""
    folder, model = tmp_path_factory.mktemp("store"), adapted()
    save_network(folder / "transformer", model, component="wan2.1_i2v_dit")
    save_network(folder / LORA, lora_of(model), component="lora")
    adapter = randomise(AudioAdapter(CONFIG.audio_adapter, rngs=nnx.Rngs(0)))
    save_network(folder / "audio_adapter", adapter, component="fantasytalking")
    return folder


def stored_transformer(store, merge_lora):
    networks = object.__new__(StoredNetworks)  # the other networks are not in this store
    networks.directory, networks.config, networks.merge_lora = store, CONFIG, merge_lora
    networks._new = set()
    return networks.transformer()


def test_adding_one_changes_nothing_to_a_layer_to_the_last_bit():
    x = jax.random.normal(jax.random.key(0), (5, 7, 32))
    layer = nnx.Linear(32, 48, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(48.0) / 7
    with_lora = nnx.Dict(layer=nnx.clone(layer))
    add_lora(with_lora, ["layer"], SIZES, rngs=nnx.Rngs(1))
    assert with_lora["layer"].dot_general.lora_a[...].any()
    assert np.array_equal(with_lora["layer"](x), layer(x))


@pytest.mark.slow
def test_adding_one_changes_nothing_to_the_transformer():
    model = adapted(learnt=False)
    assert len(lora_of(model).products()) == 12  # self-attention 4, cross-attention 6, MLP 2
    # To the last bit, operation by operation; programs that are compiled as a whole may round differently.
    with jax.disable_jit():
        assert np.array_equal(velocity_of(model), velocity_of(base()))
    assert relative(velocity(model), velocity(base())) < 1e-6


def test_a_lora_that_is_there_is_kept():
    model = adapted()
    again = nnx.clone(model)
    add_lora(again, lora_layers(again, RULES), SIZES, rngs=nnx.Rngs(8))
    pairs = zip(*(jax.tree.leaves(nnx.state(each)) for each in (model, again)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_only_the_thin_matrices_have_gradients_and_every_layer_gets_one():
    graphdef, params, rest = nnx.split(adapted(), trained(RULES), ...)
    assert {path[-1] for path, _ in nnx.to_flat_state(params)} == {"lora_a", "lora_b"}
    gradients = jax.jit(jax.grad(lambda p: (velocity_of(nnx.merge(graphdef, p, rest)) ** 2).mean()))(params)
    for path, gradient in nnx.to_flat_state(gradients):
        per_layer = np.abs(np.asarray(gradient[...])).reshape(3, -1).max(axis=1)
        assert (per_layer > 0).all(), path


def test_merged_and_apart_are_the_same(store):
    merged, apart = (stored_transformer(store, merge_lora=merge) for merge in (True, False))
    assert lora_of(merged) is None
    assert lora_of(apart).config == lora_of(adapted()).config
    merged.adapters.pop("audio")
    apart.adapters.pop("audio")
    assert jnp.array_equal(velocity(apart), velocity(adapted()))
    assert relative(velocity(merged), velocity(apart)) < 2e-6
    assert relative(velocity(merged), velocity(base())) > 0.01  # it does something


def test_diffusers_reads_what_is_exported(store, tmp_path, capsys):
    import torch
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    def export(component, *options):
        path = tmp_path / f"{component}{len(options)}.safetensors"
        where = ("--weights", store, "--component", component, "--output", path)
        code, _, errors = run_convert_weights(capsys, "export", *where, *options)
        assert code == 0, errors
        return load_file(path)

    thin = export(LORA)
    assert thin["diffusion_model.blocks.2.ffn.2.lora_A.weight"].shape == (4, 48)
    theirs = _convert_non_diffusers_wan_lora_to_diffusers({k: torch.from_numpy(v) for k, v in thin.items()})
    assert len(theirs) == len(thin) == 2 * 12 * 3
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


def test_a_lora_of_another_model_is_refused(store, tmp_path):
    other = replace(CONFIG.transformer, ffn_dim=64)
    model = nnx.eval_shape(lambda: WanTransformer(other, rngs=nnx.Rngs(0)))
    sizes = lora_of(adapted()).config
    lora = load_network(store / LORA, sizes, dtype=jnp.float32)
    with pytest.raises(ConfigError, match=r"lora: is for \(3, 32, 48\) at blocks/mlp_in, not \(3, 32, 64\)"):
        attach_lora(model, lora)
    save_network(tmp_path / LORA, lora, component="lora")
    save_network(tmp_path / "transformer", randomise(model), component="wan2.1_i2v_dit")
    from fantasy_jax.weights import lora_merge

    with pytest.raises(WeightsError, match=r"is for blocks/mlp_.* of another model"):
        load_network(tmp_path / "transformer", other, dtype=jnp.float32, merge=lora_merge(tmp_path / LORA))


def test_another_rank_is_refused():
    model = adapted()
    with pytest.raises(ConfigError, match=r"blocks/.* has one with .*rank=4.*; go on with the same"):
        add_lora(model, lora_layers(model, RULES), LoRAConfig(rank=8), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="rank is 0; at least 1 is needed"):
        LoRAConfig(rank=0)


def test_rules_cover_every_parameter_the_first_counts():
    model = nnx.eval_shape(adapted)
    found = treatments(model, (("mlp_in", "trained"), ("^blocks/.*kernel$", "lora"), ("", "frozen")))
    assert found["blocks/mlp_in/kernel"] == found["blocks/mlp_in/bias"] == "trained"
    assert found["blocks/mlp_out/kernel"] == "lora"
    assert found["blocks/mlp_out/bias"] == "frozen"
    assert len(found) == len(nnx.to_flat_state(nnx.state(nnx.eval_shape(base), nnx.Param)))
    assert set(treatments(model, EVERYTHING).values()) == {"trained"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (("^blocks/", "trained"),),
            r"parameters: no rule for image/linear_in/bias, image/linear_in/kernel, image/linear_out/bias "
            r"and \d+ more; end with \('', 'frozen'\) or \('', 'trained'\)",
        ),
        ((("^adaptors/", "trained"), ("", "frozen")), "the rule for '\\^adaptors/' decides on nothing"),
        ((("^blocks/", "lora"), ("", "frozen")), "blocks/cross_attention/image/key/bias can have no LoRA"),
    ],
)
def test_rules_that_cannot_be_are_one_line(rules, message):
    with pytest.raises(ConfigError, match=message) as error:
        lora_layers(nnx.eval_shape(base), rules)
    assert "\n" not in str(error.value)


def test_on_a_mesh_the_thin_matrices_are_cut_like_the_kernels_beside_them():
    model = nnx.eval_shape(adapted)
    cut = {
        "/".join(map(str, path)): sharding.spec
        for path, sharding in nnx.to_flat_state(
            parameter_shardings(nnx.state(model, nnx.Param), make_mesh(fsdp=2, tensor=2))
        )
    }
    for layer in ("blocks/self_attention/query", "blocks/cross_attention/text/value", "blocks/mlp_in"):
        assert cut[f"{layer}/dot_general/lora_b"][-1] == cut[f"{layer}/kernel"][-1] == "tensor"
        assert cut[f"{layer}/dot_general/lora_a"][-2] == cut[f"{layer}/kernel"][-2] == "fsdp"
    for layer in ("blocks/self_attention/out", "blocks/mlp_out"):
        assert cut[f"{layer}/dot_general/lora_a"][-2] == cut[f"{layer}/kernel"][-2] == "tensor"
        assert cut[f"{layer}/dot_general/lora_b"][-1] == cut[f"{layer}/kernel"][-1] == "fsdp"
