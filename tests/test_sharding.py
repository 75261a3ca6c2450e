"""Computation on a mesh equals computation on one device, with only the collectives that are needed."""

import functools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import TINY_AUDIO, TINY_WAN, abstract, layer, randomise, relative, small_networks
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.config import build, load_config
from fantasy_jax.diffusion.guidance import guidance_branches
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.condition import Condition
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.sharding import (
    MESH_AXES,
    MeshConfig,
    axis_size,
    batch_sharding,
    constrain,
    make_global_batch,
    make_mesh,
    parameter_partition,
    parameter_shardings,
    partition,
    process_rows,
)
from fantasy_jax.system.encoders import encode_audio, encode_image, encode_text
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import abstract_networks
from fantasy_jax.training.objective import StageConfig, velocity_objective

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

CONFIG = replace(TINY_WAN, num_heads=4, num_layers=2)
AUDIO = replace(TINY_AUDIO, num_heads=4, num_layers=2)
BATCH, FRAMES, HEAD_WIDTH = 2, 3, CONFIG.dim // CONFIG.num_heads
MESHES = [
    dict(zip(MESH_AXES, sizes, strict=True))
    for sizes in [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2), (2, 2, 2, 1)]
]
CONTEXT_MESHES = [{"context": 4}, {"context": 4, "data": 2}]
EVEN, UNEVEN = (4, 6), (5, 3)  # 24 tokens of space, and 15, which do not divide into four
GUIDANCE = guidance_branches(2, 5.0, 4.5)

COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*?^}", re.MULTILINE | re.DOTALL)
COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
    r"|reduce-scatter)(?:-start)?\("
)


def make_transformer(config=CONFIG, audio=AUDIO, dtype=jnp.float32):
    def make(*, rngs):
        adapters = {"audio": AudioAdapter(audio, rngs=rngs, dtype=dtype)}
        return WanTransformer(config, adapters=adapters, rngs=rngs, dtype=dtype)

    return randomise(abstract(make))


@pytest.fixture(scope="module")
def transformer():
    return make_transformer()


@pytest.fixture(scope="module")
def wide_transformer():
    """A transformer with eight heads, one for each of eight devices."""
    return make_transformer(replace(CONFIG, dim=64, num_heads=8), replace(AUDIO, width=64, num_heads=8))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def model_inputs(rows, columns, batch=BATCH):
    """Latents of `rows * columns` tokens per frame, and all conditions."""
    size = (batch, FRAMES, 2 * rows, 2 * columns)
    return {
        "latents": draw(*size, 16),
        "first_frame": draw(*size, 20, seed=1),
        "timestep": jnp.linspace(100.25, 900.5, batch),
        "text": draw(batch, 5, CONFIG.text_dim, seed=2),
        "image": draw(batch, 9, CONFIG.image_dim, seed=3),
        "audio": draw(batch, 19, AUDIO.feature_width, seed=4),
    }


def sampler_inputs(rows, columns, batch):
    """Noise and inputs of clips, the same as `model_inputs`."""
    noise, first_frame, _, text, image, audio = model_inputs(rows, columns, batch).values()
    return noise, ClipInputs(first_frame, text, 2 * text, image, {"audio": audio})


def run_model(model, inputs, attention="frame"):
    conditions = model.conditions(inputs["text"], inputs["image"])
    conditions["audio"] = model.adapters["audio"].condition(inputs["audio"], 9, attention=attention)
    return model(inputs["latents"], inputs["first_frame"], inputs["timestep"], conditions)


def compile_block(transformer, mesh, rows, columns, strategy, options=None):
    """Compiles one block with its adapter, for tokens that are sharded as they are between blocks."""
    space = rows * columns
    padded = space + -space % axis_size("context")
    parts = layer(transformer.blocks, 0), layer(transformer.adapters["audio"].layers, 0)
    graphdef, state = nnx.split(parts)
    conditions = {
        "text": Condition(draw(BATCH, CONFIG.text_length, CONFIG.dim, seed=1)),
        "image": Condition(draw(BATCH, 9, CONFIG.dim, seed=2)),
        "audio": Condition(
            draw(BATCH, FRAMES, 17, AUDIO.token_width, seed=3), jnp.full((BATCH, FRAMES), 12), jnp.ones(BATCH)
        ),
    }
    rotary = tuple(draw(padded, FRAMES, HEAD_WIDTH, seed=i) for i in (4, 5))

    def run(state, x, modulation, rotary, conditions):
        block, kv_layer = nnx.merge(graphdef, state)
        return block(x, modulation, rotary, space, conditions, {"audio": kv_layer}, strategy)

    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    x = jax.device_put(draw(BATCH, padded, FRAMES, CONFIG.dim), sharding)
    others = (state, draw(BATCH, 6, CONFIG.dim, seed=6), rotary, conditions)
    state, *others = jax.device_put(others, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(run, out_shardings=sharding).lower(state, x, *others).compile(options)
    return compiled, padded


def collectives(program, computations=None):
    """Counts the collectives of a program, or of some of its computations, by kind, type and size."""
    found = []
    for computation in COMPUTATION.finditer(program):
        if computations is None or computation[1] in computations:
            for result, kind in COLLECTIVE.findall(computation[0]):
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)  # several, for several devices
                elements = sum(int(np.prod([int(n) for n in shape.split(",")])) for _, shape in shapes)
                found.append((kind, shapes[0][0], elements))
    return Counter(found)


def expected_collectives(strategy, padded, mesh, dtype="f32"):
    """Gathers keys and values of all space; or exchanges queries, keys, values and results."""
    batch = BATCH // (mesh.shape["data"] * mesh.shape["fsdp"])
    gathered = batch * padded * FRAMES * CONFIG.dim
    return {
        "gather": {("all-gather", dtype, gathered): 2},
        "all_to_all": {("all-to-all", dtype, gathered // mesh.shape["context"]): 4},
    }[strategy]


@pytest.mark.parametrize("strategy", ["gather", "all_to_all"])
@pytest.mark.parametrize("grid", [EVEN, UNEVEN])
@pytest.mark.parametrize("sizes", CONTEXT_MESHES, ids=str)
def test_a_block_communicates_for_self_attention_only(transformer, sizes, grid, strategy):
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        compiled, padded = compile_block(transformer, mesh, *grid, strategy)
    assert collectives(compiled.as_text()) == expected_collectives(strategy, padded, mesh)


def test_keys_are_gathered_in_bfloat16(tmp_path):
    # Dumped before the CPU compiler converts bfloat16 to float32.
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partition.*"}
    mesh = make_mesh(context=4)
    with jax.set_mesh(mesh):
        _, padded = compile_block(make_transformer(dtype=jnp.bfloat16), mesh, *EVEN, "gather", options)
    (partitioned,) = tmp_path.glob("*after_spmd-partitioning*")
    assert collectives(partitioned.read_text()) == expected_collectives("gather", padded, mesh, "bf16")


@pytest.mark.parametrize(("grid", "attention"), [(EVEN, "frame"), (UNEVEN, "frame"), (UNEVEN, "clip")])
@pytest.mark.parametrize("sizes", CONTEXT_MESHES, ids=str)
def test_transformer_on_a_mesh(transformer, sizes, grid, attention):
    graphdef, state = nnx.split(transformer)
    inputs = model_inputs(*grid)

    def run(state, inputs):
        return run_model(nnx.merge(graphdef, state), inputs, attention)

    expected = np.asarray(jax.jit(run)(state, inputs))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((state, inputs), NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(run).lower(*arguments).compile()
        assert relative(compiled(*arguments), expected) < 2e-6
    program = compiled.as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    padded = -(-grid[0] * grid[1] // 4) * 4
    assert collectives(program, bodies) == expected_collectives("all_to_all", padded, mesh)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"tensor": 2, "context": 2, "data": 2}], ids=str)
def test_heads_are_sharded_too(transformer, sizes):
    inputs = model_inputs(*UNEVEN)
    expected = np.asarray(nnx.jit(run_model)(transformer, inputs))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(transformer)
        state, inputs = jax.device_put((state, inputs), NamedSharding(mesh, PartitionSpec()))
        result = jax.jit(lambda state, inputs: run_model(nnx.merge(graphdef, state), inputs))(state, inputs)
        assert relative(result, expected) < 2e-6


@pytest.mark.parametrize("batch_branches", [True, False])
def test_sampling_with_replicated_parameters(transformer, batch_branches):
    noise, inputs = sampler_inputs(*UNEVEN, batch=1)
    config = SamplerConfig(num_inference_steps=2, batch_branches=batch_branches)
    expected = np.asarray(sample(transformer, noise, inputs, config, guidance=GUIDANCE))
    mesh = make_mesh(context=4)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(transformer)
        replicated = NamedSharding(mesh, PartitionSpec())
        state, noise, inputs = jax.device_put((state, noise, inputs), replicated)
        result = sample(nnx.merge(graphdef, state), noise, inputs, config, guidance=GUIDANCE)
        assert relative(result, expected) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(5, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_sampling_with_sharded_parameters(wide_transformer, sizes, grid):
    noise, inputs = sampler_inputs(*grid, batch=8)
    config = SamplerConfig(num_inference_steps=2)
    expected = np.asarray(sample(wide_transformer, noise, inputs, config, guidance=GUIDANCE))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(wide_transformer)
        state = jax.device_put(state, parameter_shardings(state, mesh))
        noise, inputs = jax.device_put((noise, inputs), batch_sharding(mesh))
        result = sample(nnx.merge(graphdef, state), noise, inputs, config, guidance=GUIDANCE)
        assert relative(result, expected) < 1e-5


def training_batch(rows, columns):
    inputs = model_inputs(rows, columns, batch=8)
    del inputs["timestep"]
    lips = np.zeros(inputs["latents"].shape[:-1], np.float32)
    lips[::2, :, rows:, :columns] = 1
    first_frame = inputs["first_frame"][..., 4:]
    text = jnp.pad(inputs["text"], ((0, 0), (0, CONFIG.text_length - 5), (0, 0)))
    return inputs | {"lips": jnp.asarray(lips), "first_frame": first_frame, "text": text}


@pytest.fixture(scope="module")
def gradients_on_one_device(wide_transformer):
    return functools.cache(lambda grid: gradients(wide_transformer, training_batch(*grid), make_mesh()))


def gradients(model, batch, mesh, strategy="auto"):
    """Loss and gradients with parameters and batch sharded as in training."""
    model.context_parallelism = strategy
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    config = StageConfig(audio_attention="frame", lip_mask_probability=0.5, outside_lips=0.1)
    empty = np.zeros((1, 2, CONFIG.text_dim), np.float32)
    keys = jax.random.split(jax.random.key(0), len(batch["latents"]))

    def loss(params, batch):
        merged = nnx.merge(graphdef, params, rest)
        return velocity_objective(merged, batch, keys, config=config, empty_text=empty)[0]

    with jax.set_mesh(mesh):
        shardings = parameter_shardings(params, mesh)
        placed = jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh))
        return jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(*placed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "grid", "strategy"),
    [
        *((sizes, grid, "auto") for sizes in MESHES for grid in ((5, 5), (5, 3))),
        ({"context": 8}, (5, 3), "gather"),
    ],
    ids=str,
)
def test_gradients_on_a_mesh(wide_transformer, gradients_on_one_device, sizes, grid, strategy):
    expected_loss, expected = gradients_on_one_device(grid)
    loss, found = gradients(wide_transformer, training_batch(*grid), make_mesh(**sizes), strategy)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for (path, one), other in zip(
        jax.tree.flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True
    ):
        assert relative(one, other) < 1e-5, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def networks():
    """Random networks of the debug configuration's sizes."""
    config = load_config(str(Path(__file__).parent.parent / "configs/fantasy_talking_14b.py:debug"))
    return small_networks(build(ModelConfig, config.model, "model"))


def encode_prompts(networks):
    return jnp.concatenate(encode_text(networks, ["A woman is talking.", "Nothing moves."]), axis=1)


def encode_portrait(networks):
    return encode_image(networks, draw(64, 48, 3).clip(-1, 1))


def encode_speech(networks):
    return encode_audio(networks["speech_encoder"], np.asarray(draw(8000)))


@pytest.mark.parametrize("encode", [encode_prompts, encode_portrait, encode_speech])
def test_encoders_on_a_mesh(networks, encode):
    expected = np.asarray(encode(networks))
    with networks.on_mesh(MeshConfig(fsdp=2, context=2, tensor=2)) as sharded:
        assert relative(encode(sharded), expected) < 1e-5


def test_encoders_are_sharded_by_the_table(networks):
    config = MeshConfig(fsdp=2, tensor=2)
    sharded = abstract_networks(networks.config, make_mesh(**config.axes), config)
    columns, rows = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
    assert sharded["text_encoder"].blocks.query.kernel.sharding.spec == columns
    assert sharded["text_encoder"].blocks.mlp_out.kernel.sharding.spec == rows
    assert sharded["image_encoder"].blocks.mlp_in.kernel.sharding.spec == columns
    assert sharded["speech_encoder"].layers.out.kernel.sharding.spec == rows
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(sharded["vae"])))


def test_parameters_are_sharded_by_the_table(wide_transformer):
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    params = nnx.state(wide_transformer, nnx.Param)
    optimizer = optax.adam(1e-3)
    found = {
        "/".join(str(key) for key in path): sharding.spec
        for path, sharding in nnx.to_flat_state(parameter_shardings(params, mesh))
    }
    assert found["blocks/mlp_in/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["blocks/self_attention/out/kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["blocks/self_attention/query_norm/scale"] == PartitionSpec(None, "tensor")
    assert found["adapters/audio/layers/key/kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["blocks/modulation"] == PartitionSpec(None, None, None)
    # Moments of the optimizer are sharded as their parameters are.
    moments = parameter_shardings(jax.eval_shape(optimizer.init, params), mesh)[0].mu
    assert jax.tree.leaves(moments) == jax.tree.leaves(parameter_shardings(params, mesh))


def test_dimensions_that_do_not_divide_are_not_sharded():
    mesh = make_mesh(fsdp=8)
    assert parameter_partition("blocks/query/kernel", (2, 12, 8), mesh) == PartitionSpec(None, None, "tensor")


def test_value_error_for_partitions():
    with pytest.raises(ValueError, match="collide"):
        partition("batch", "embed")
    with pytest.raises(ValueError, match="blocks/query/kernel"):
        parameter_partition("blocks/query/kernel", (12,), make_mesh(fsdp=8))


@pytest.mark.parametrize(
    "sizes", [{"data": -1, "fsdp": -1}, {"context": 0}, {"data": 3, "fsdp": -1}, {"data": 16}], ids=str
)
def test_config_error_for_meshes(sizes):
    with pytest.raises(ConfigError, match="mesh"):
        make_mesh(**sizes)


def test_processes_load_the_rows_of_their_devices():
    mesh = make_mesh(data=2, fsdp=2, context=2)
    rows = process_rows(8, mesh)
    assert rows.tolist() == list(range(8))
    batch = make_global_batch({"x": np.arange(16).reshape(8, 2)}, rows, 8, mesh)
    assert np.array_equal(batch["x"], np.arange(16).reshape(8, 2))
    assert batch["x"].sharding == batch_sharding(mesh)
    with pytest.raises(ConfigError, match="batch_size"):
        process_rows(6, mesh)


def test_without_a_mesh_nothing_is_sharded():
    x = draw(2, 3)
    assert axis_size("context") == 1
    assert constrain(x, "batch", "space") is x


def test_a_mesh_takes_the_first_devices():
    mesh = make_mesh(context=2, data=2)
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == (2, 1, 2, 1)
    assert set(mesh.devices.flat) == set(jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert [axis_size(name) for name in MESH_AXES] == [2, 1, 2, 1]
        assert axis_size("no such axis") == 1
    backwards = make_mesh(context=2, devices=jax.devices()[:1:-1][:2])
    assert set(backwards.devices.flat) == set(jax.devices()[-2:])
