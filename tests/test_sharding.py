"""On a mesh: what devices exchange, read off the compiled program, and that they compute what one does."""

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
from helpers import TINY_AUDIO, TINY_WAN, layer, randomise, relative
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.config import ConfigError, build, load_config
from fantasy_jax.data.text import byte_tokenizer
from fantasy_jax.diffusion.sampler import SamplerConfig, SamplerInputs, sample
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.condition import Condition
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import (
    ModelConfig,
    RandomNetworks,
    encode_picture,
    encode_text,
    on_mesh,
)
from fantasy_jax.sharding import (
    MESH_AXES,
    MeshConfig,
    assemble_batch,
    axis_size,
    batch_sharding,
    constrain,
    make_mesh,
    parameter_partition,
    parameter_shardings,
    partition,
    rows_of_this_process,
    share,
)
from fantasy_jax.training.talking import TalkingStageConfig, talking_loss

pytestmark = pytest.mark.networks

CONFIG = replace(TINY_WAN, num_heads=4, num_layers=2)
AUDIO = replace(TINY_AUDIO, num_heads=4, num_layers=2)
BATCH, FRAMES, HEAD_WIDTH = 2, 3, CONFIG.dim // CONFIG.num_heads
MESHES = [
    dict(zip(MESH_AXES, sizes, strict=True))
    for sizes in [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2), (2, 2, 2, 1)]
]
CONTEXT_MESHES = [{"context": 4}, {"context": 4, "data": 2}]
EVEN, UNEVEN = (4, 6), (5, 3)  # 24 tokens of space, and 15, which four devices cannot share evenly

COMPUTATION = re.compile(r"^(?:ENTRY )?%?(\S+) \(.*?^}", re.MULTILINE | re.DOTALL)
COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
    r"|reduce-scatter)(?:-start)?\("
)


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def make_transformer(dtype=jnp.float32):
    def make():
        adapters = {"audio": AudioAdapter(AUDIO, rngs=nnx.Rngs(0), dtype=dtype)}
        return WanTransformer(CONFIG, adapters=adapters, rngs=nnx.Rngs(0), dtype=dtype)

    return randomise(nnx.eval_shape(make))


@pytest.fixture(scope="module")
def transformer():
    return make_transformer()


@pytest.fixture(scope="module")
def wide_transformer():
    """Of eight heads, which eight devices can share."""

    def make():
        adapters = {"audio": AudioAdapter(replace(AUDIO, width=64, num_heads=8), rngs=nnx.Rngs(0))}
        return WanTransformer(replace(CONFIG, dim=64, num_heads=8), adapters=adapters, rngs=nnx.Rngs(0))

    return randomise(nnx.eval_shape(make))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def model_inputs(rows, columns, batch=BATCH):
    """Latents of `rows * columns` tokens a frame, and everything to listen to."""
    size = (batch, FRAMES, 2 * rows, 2 * columns)
    return {
        "latents": draw(*size, 16),
        "first_frame": draw(*size, 20, seed=1),
        "timestep": jnp.linspace(100.25, 900.5, batch),
        "text": draw(batch, 5, CONFIG.text_dim, seed=2),
        "image": draw(batch, 9, CONFIG.image_dim, seed=3),
        "audio": draw(batch, 19, AUDIO.feature_width, seed=4),
    }


def run_model(model, inputs, clip_level=False):
    adapter, audio = model.adapters["audio"], inputs["audio"]
    conditions = model.conditions(inputs["text"], inputs["image"])
    conditions["audio"] = adapter.clip_level(audio, 9) if clip_level else adapter.frame_level(audio, 9)
    return model(inputs["latents"], inputs["first_frame"], inputs["timestep"], conditions)


def compile_block(transformer, mesh, rows, columns, way, options=None):
    """One block with its adapter under the mesh, its tokens cut as between blocks."""
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
    rotary = tuple(draw(padded, FRAMES, HEAD_WIDTH // 2, seed=i) for i in (4, 5))

    def run(state, x, modulation, rotary, conditions):
        block, hearer = nnx.merge(graphdef, state)
        return block(x, modulation, rotary, space, conditions, {"audio": hearer}, way)

    cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    x = jax.device_put(draw(BATCH, padded, FRAMES, CONFIG.dim), cut)
    others = (state, draw(BATCH, 6, CONFIG.dim, seed=6), rotary, conditions)
    state, *others = jax.device_put(others, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(run, out_shardings=cut).lower(state, x, *others).compile(options)
    return compiled, padded


def exchanges(program, computations=None):
    """Kind, type and element count of every collective of a program, or of some of its computations."""
    found = []
    for computation in COMPUTATION.finditer(program):
        if computations is None or computation[1] in computations:
            for result, kind in COLLECTIVE.findall(computation[0]):
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)  # several, if they go to several devices
                elements = sum(int(np.prod([int(n) for n in shape.split(",")])) for _, shape in shapes)
                found.append((kind, shapes[0][0], elements))
    return Counter(found)


def exchanged(way, padded, mesh, dtype="f32"):
    """Keys and values, of all space or of one device's part; or every head's queries and results, too."""
    batch = BATCH // (mesh.shape["data"] * mesh.shape["fsdp"])
    whole = batch * padded * FRAMES * CONFIG.dim
    part = whole // mesh.shape["context"]
    return {
        "gather": {("all-gather", dtype, whole): 2},
        "all_to_all": {("all-to-all", dtype, part): 4},
        "ring": {("collective-permute", dtype, part): 2},
    }[way]


@pytest.mark.parametrize("way", ["gather", "all_to_all", "ring"])
@pytest.mark.parametrize("grid", [EVEN, UNEVEN])
@pytest.mark.parametrize("sizes", CONTEXT_MESHES, ids=str)
def test_a_block_exchanges_what_self_attention_needs_and_nothing_else(transformer, sizes, grid, way):
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        compiled, padded = compile_block(transformer, mesh, *grid, way)
    assert exchanges(compiled.as_text()) == exchanged(way, padded, mesh)


def test_keys_are_gathered_after_they_are_rounded(tmp_path):
    # Read before the CPU's compiler turns bfloat16 into float32.
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partition.*"}
    mesh = make_mesh(context=4)
    with jax.set_mesh(mesh):
        _, padded = compile_block(make_transformer(jnp.bfloat16), mesh, *EVEN, "gather", options)
    (partitioned,) = tmp_path.glob("*after_spmd-partitioning*")
    assert exchanges(partitioned.read_text()) == exchanged("gather", padded, mesh, "bf16")


@pytest.mark.parametrize(("grid", "clip_level"), [(EVEN, False), (UNEVEN, False), (UNEVEN, True)])
@pytest.mark.parametrize("sizes", CONTEXT_MESHES, ids=str)
def test_the_transformer_on_a_mesh_is_the_transformer(transformer, sizes, grid, clip_level):
    graphdef, state = nnx.split(transformer)
    inputs = model_inputs(*grid)

    def run(state, inputs):
        return run_model(nnx.merge(graphdef, state), inputs, clip_level)

    expected = np.asarray(jax.jit(run)(state, inputs))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((state, inputs), NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(run).lower(*arguments).compile()
        assert relative(compiled(*arguments), expected) < 2e-6
    program = compiled.as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    padded = -(-grid[0] * grid[1] // 4) * 4
    assert exchanges(program, bodies) == exchanged("all_to_all", padded, mesh)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"tensor": 2, "context": 2, "data": 2}], ids=str)
def test_heads_can_be_cut_too(transformer, sizes):
    inputs = model_inputs(*UNEVEN)
    forward = nnx.jit(run_model)
    expected = np.asarray(forward(transformer, inputs))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(transformer)
        state, inputs = jax.device_put((state, inputs), NamedSharding(mesh, PartitionSpec()))
        result = jax.jit(lambda state, inputs: run_model(nnx.merge(graphdef, state), inputs))(state, inputs)
        assert relative(result, expected) < 2e-6


@pytest.mark.parametrize("batch_branches", [True, False])
def test_sampling_on_a_mesh_is_sampling(transformer, batch_branches):
    inputs = model_inputs(*UNEVEN, batch=1)
    heard = SamplerInputs(
        inputs["first_frame"], inputs["text"], 2 * inputs["text"], inputs["image"], inputs["audio"]
    )
    config = SamplerConfig(steps=2, batch_branches=batch_branches)
    expected = np.asarray(sample(transformer, inputs["latents"], heard, config))
    mesh = make_mesh(context=4)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(transformer)
        state, heard, noise = jax.device_put(
            (state, heard, inputs["latents"]), NamedSharding(mesh, PartitionSpec())
        )
        assert relative(sample(nnx.merge(graphdef, state), noise, heard, config), expected) < 5e-6


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


def gradients(model, batch, mesh, way="auto"):
    """Loss and gradients with parameters and batch cut as in training."""
    model.context_parallelism = way
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    config = TalkingStageConfig(audio="frame", lip_probability=0.5, outside_lips=0.1)
    empty = np.zeros((1, 2, CONFIG.text_dim), np.float32)

    keys = jax.random.split(jax.random.key(0), len(batch["latents"]))

    def loss(params, batch):
        merged = nnx.merge(graphdef, params, rest)
        return talking_loss(merged, batch, keys, config=config, empty_text=empty)[0]

    with jax.set_mesh(mesh):
        shardings = parameter_shardings(params, mesh)
        placed = jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh))
        return jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(*placed)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(5, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_training_on_a_mesh_is_training(wide_transformer, gradients_on_one_device, sizes, grid):
    check_training(wide_transformer, gradients_on_one_device, sizes, grid, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["gather", "ring"])
def test_training_across_context_is_training_whichever_way(wide_transformer, gradients_on_one_device, way):
    check_training(wide_transformer, gradients_on_one_device, {"context": 8}, (5, 3), way)


def check_training(transformer, on_one_device, sizes, grid, way):
    expected_loss, expected = on_one_device(grid)
    loss, found = gradients(transformer, training_batch(*grid), make_mesh(**sizes), way)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for (path, one), other in zip(
        jax.tree.flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True
    ):
        assert relative(one, other) < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(5, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_guided_samples_on_a_mesh_are_guided_samples(wide_transformer, sizes, grid):
    inputs = model_inputs(*grid, batch=8)
    heard = SamplerInputs(
        inputs["first_frame"], inputs["text"], 2 * inputs["text"], inputs["image"], inputs["audio"]
    )
    config = SamplerConfig(steps=2)
    expected = np.asarray(sample(wide_transformer, inputs["latents"], heard, config))
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(wide_transformer)
        state = jax.device_put(state, parameter_shardings(state, mesh))
        noise, heard = jax.device_put((inputs["latents"], heard), batch_sharding(mesh))
        assert relative(sample(nnx.merge(graphdef, state), noise, heard, config), expected) < 1e-5


@pytest.fixture(scope="module")
def networks():
    """Random, of the debug configuration's sizes."""
    config = load_config(str(Path(__file__).parent.parent / "configs/fantasy_talking_14b.py:debug"))
    return RandomNetworks(build(ModelConfig, config.model, "model"), byte_tokenizer())


def encode_prompts(networks):
    return jnp.concatenate(encode_text(networks, ["A woman is talking.", "Nothing moves."]), axis=1)


def encode_portrait(networks):
    return encode_picture(networks, draw(64, 48, 3).clip(-1, 1))


def encode_speech(networks):
    return networks.speech_encoder()(np.asarray(draw(8000)))


@pytest.mark.parametrize("encode", [encode_prompts, encode_portrait, encode_speech])
def test_encoders_on_a_mesh_are_the_encoders(networks, encode):
    expected = np.asarray(encode(networks))
    with on_mesh(networks, MeshConfig(fsdp=2, context=2, tensor=2)) as shared:
        assert relative(encode(shared), expected) < 1e-5


def test_encoders_are_cut_by_the_table(networks):
    mesh = make_mesh(fsdp=2, tensor=2)
    text, picture, speech, vae = (
        share(nnx.eval_shape(make), mesh)
        for make in (
            lambda: networks.text_encoder()[0],
            networks.image_encoder,
            lambda: networks.speech_encoder().model,
            networks.vae,
        )
    )
    columns, rows = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
    assert text.blocks.query.kernel.sharding.spec == columns
    assert text.blocks.mlp_out.kernel.sharding.spec == rows
    assert picture.blocks.mlp_in.kernel.sharding.spec == columns
    assert speech.layers.out.kernel.sharding.spec == rows
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(vae)))


def test_parameters_are_cut_by_the_table(wide_transformer):
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
    # Whatever is kept for a parameter is cut as it is.
    kept = parameter_shardings(jax.eval_shape(optimizer.init, params), mesh)[0].mu
    assert jax.tree.leaves(kept) == jax.tree.leaves(parameter_shardings(params, mesh))


def test_what_does_not_divide_is_left_whole_and_what_collides_is_refused():
    mesh = make_mesh(fsdp=8)
    assert parameter_partition("blocks/query/kernel", (2, 12, 8), mesh) == PartitionSpec(None, None, "tensor")
    with pytest.raises(ValueError, match="collide: they are cut along"):
        partition("batch", "embed")
    with pytest.raises(ValueError, match="has 1 dimensions, its rule is for 2"):
        parameter_partition("blocks/query/kernel", (12,), mesh)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"context": 0}, "at least 1"),
        ({"data": 3, "fsdp": -1}, "does not fit 8 devices"),
        ({"data": 16}, "does not fit 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(**sizes)


def test_processes_read_what_their_devices_need():
    mesh = make_mesh(data=2, fsdp=2, context=2)
    rows = rows_of_this_process(8, mesh)
    assert rows.tolist() == list(range(8))
    batch = assemble_batch({"x": np.arange(16).reshape(8, 2)}, rows, 8, mesh)
    assert np.array_equal(batch["x"], np.arange(16).reshape(8, 2))
    assert batch["x"].sharding == batch_sharding(mesh)
    with pytest.raises(ConfigError, match="a batch of 6 cannot be shared by 4"):
        rows_of_this_process(6, mesh)


def test_without_a_mesh_nothing_is_constrained():
    x = draw(2, 3)
    assert axis_size("context") == 1
    assert constrain(x, "batch", "space") is x


def test_a_mesh_takes_the_first_devices_it_needs():
    mesh = make_mesh(context=2, data=2)
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == (2, 1, 2, 1)
    assert set(mesh.devices.flat) == set(jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert [axis_size(name) for name in MESH_AXES] == [2, 1, 2, 1]
        assert axis_size("no such axis") == 1
    backwards = make_mesh(context=2, devices=jax.devices()[:1:-1][:2])
    assert set(backwards.devices.flat) == set(jax.devices()[-2:])
