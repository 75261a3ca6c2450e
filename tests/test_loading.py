"""Networks from a store on a mesh of eight devices: equal to those in host memory, and sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_network
from safetensors.numpy import save_file

from configs import fantasy_portrait_14b
from configs.fantasy_talking_14b import small_model
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.lora import LoRAConfig, LoRASizes, add_lora, lora_of
from fantasy_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from fantasy_jax.system.registry import component_of
from fantasy_jax.training.parameters import lora_layers
from fantasy_jax.weights import loading
from fantasy_jax.weights.loading import stored_networks
from fantasy_jax.weights.lora import LoRAFile
from fantasy_jax.weights.store import LORA, save_network

FILE = "lora.safetensors"
MESH = MeshConfig(fsdp=2, context=2, tensor=2)
RULES = (("^blocks/.*kernel$|text_in/kernel", "lora"), ("", "frozen"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of all networks of the debug configuration, and a LoRA of stacked and of single layers."""
    folder = tmp_path_factory.mktemp("store")
    for seed, (slot, config) in enumerate(small_model().networks.items()):
        network = random_network(config, seed)
        if slot == "transformer":  # two parameters keep their type
            network.text_in.kernel = nnx.Param(network.text_in.kernel[...].astype(jnp.bfloat16))
            kernel = network.blocks.mlp_in.kernel
            network.blocks.mlp_in.kernel = nnx.Param(kernel[...].astype(jnp.bfloat16))
            save_network(folder / LORA, lora(network), component=LORA)
        save_network(folder / slot, network, component=component_of(config).name)
    save_file(file_tensors(), folder / FILE)
    return folder


def file_tensors():
    """A LoRA of another program: products of one block and outside the blocks, and a difference."""
    shapes = {
        "blocks.1.self_attn.q.lora_A.weight": (2, 48),
        "blocks.1.self_attn.q.lora_B.weight": (48, 2),
        "text_embedding.0.lora_A.weight": (3, 32),
        "text_embedding.0.lora_B.weight": (48, 3),
        "blocks.0.ffn.0.diff": (96, 48),
    }
    random = np.random.default_rng(5)
    return {
        f"diffusion_model.{key}": random.standard_normal(shape, np.float32) for key, shape in shapes.items()
    }


def lora(transformer):
    """A LoRA whose products are not zero."""
    copy = nnx.clone(transformer)
    add_lora(copy, lora_layers(copy, RULES), LoRAConfig(rank=3, alpha=4.0), rngs=nnx.Rngs(0))
    sizes = lora_of(copy).config
    assert isinstance(sizes, LoRASizes)
    return random_network(sizes, seed=9)


def check_on_mesh(networks, slot):
    """Compares a network on the mesh with the one in host memory."""
    expected = networks[slot]
    with networks.on_mesh(MESH) as sharded:
        found = sharded[slot]
        mesh = sharded._mesh
    wanted, values = flat_parameters(expected), flat_parameters(found)
    assert values.keys() == wanted.keys()
    for path, value in values.items():
        np.testing.assert_array_equal(value, wanted[path], strict=True, err_msg=path)
    state = nnx.state(found, nnx.Param)
    shardings = jax.tree.leaves(parameter_shardings(state, mesh))
    leaves = jax.tree.leaves(state)
    assert all(leaf.sharding == sharding for leaf, sharding in zip(leaves, shardings, strict=True))
    others = nnx.state(found, nnx.Not(nnx.Param)), nnx.state(expected, nnx.Not(nnx.Param))
    for value, same in zip(*map(jax.tree.leaves, others), strict=True):
        np.testing.assert_array_equal(value, same)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("slot", small_model().networks)
def test_a_network_on_a_mesh_equals_the_one_in_host_memory(folder, slot, dtype):
    check_on_mesh(stored_networks(folder, small_model().replace(dtype=dtype)), slot)


@pytest.mark.slow
def test_the_networks_of_fantasyportrait_on_a_mesh_equal_those_in_host_memory(tmp_path):
    """The adapter has stacks of layers inside its resamplers, the motion encoder has integers."""
    model = fantasy_portrait_14b.small_model()
    for slot, config in model.networks.items():
        save_network(tmp_path / slot, random_network(config), component=component_of(config).name)
    networks = stored_networks(tmp_path)
    assert networks.config.expression_adapter == model.expression_adapter  # read from the store
    for slot in ("expression_adapter", "motion_encoder"):
        check_on_mesh(networks, slot)


def test_networks_are_sharded(folder):
    with stored_networks(folder).on_mesh(MESH) as networks:
        transformer = networks["transformer"]
    kernel = transformer.blocks.self_attention.query.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 24, 24)
    value = transformer.adapters["audio"].layers.value.kernel[...]
    assert value.sharding.shard_shape(value.shape) == (2, 20, 24)


def test_networks_without_a_mesh_are_whole_also_while_a_mesh_is_in_force(folder):
    networks = stored_networks(folder)
    with jax.set_mesh(make_mesh(**MESH.axes)):
        found = flat_parameters(networks["text_encoder"])
    for path, value in flat_parameters(networks["text_encoder"]).items():
        np.testing.assert_array_equal(found[path], value, strict=True)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_merged_lora_on_a_mesh_equals_the_one_in_host_memory(folder, dtype):
    files = [LoRAFile(str(folder / FILE), 0.5)]
    networks = stored_networks(folder, small_model().replace(dtype=dtype), loras=files)
    merged = check_on_mesh(networks, "transformer")
    assert lora_of(merged) is None
    plain = stored_networks(folder, small_model().replace(dtype=dtype), merge_lora=False)["transformer"]
    for path in ("blocks/self_attention/query/kernel", "blocks/mlp_in/kernel", "text_in/kernel"):
        before, after = (np.asarray(flat_parameters(x)[path], np.float32) for x in (plain, merged))
        assert np.abs(after - before).mean() > 1e-3, path


@pytest.mark.slow
def test_a_lora_beside_the_weights_is_sharded_too(folder):
    files = [LoRAFile(str(folder / FILE), 0.5)]
    networks = stored_networks(folder, small_model(), merge_lora=False, loras=files)
    unmerged = check_on_mesh(networks, "transformer")
    ranks = {unmerged.blocks.self_attention.query: 3 + 2, unmerged.blocks.mlp_out: 3, unmerged.text_in: 3 + 3}
    assert all(layer.dot_general.config.rank == rank for layer, rank in ranks.items())


def test_each_block_is_read_once_and_in_shards(folder, monkeypatch):
    read, seen = loading.read_item, []

    def watched(path, item, wanted):
        values = read(path, item, wanted)
        seen.append((path.name, item))
        if path.name == "transformer":
            assert all(isinstance(value, jax.Array) for value in values.values())
            for name, value in values.items():
                assert value.sharding == wanted[name].sharding
        return values

    monkeypatch.setattr(loading, "read_item", watched)
    with stored_networks(folder, merge_lora=False).on_mesh(MESH) as networks:
        del networks["transformer"].adapters["audio"]
    assert [item for slot, item in seen if slot == "transformer"] == ["blocks_00", "blocks_01", "rest"]


def test_new_adapters_on_a_mesh_equal_those_in_host_memory(folder):
    model = small_model()
    model = model.replace(motion_adapter=MotionAdapterConfig(hidden=8, width=model.transformer.dim))
    networks = stored_networks(folder, model, new_adapters=True)
    transformer = check_on_mesh(networks, "transformer")
    assert sorted(transformer.adapters) == ["audio", "motion"]
    assert transformer.context_parallelism == MESH.context_parallelism
