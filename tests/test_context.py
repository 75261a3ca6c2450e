"""Self-attention across devices: the three ways give what one device gives, and send what they should."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise, relative
from jax.sharding import NamedSharding

from fantasy_jax.config import ConfigError, build
from fantasy_jax.models import context_attention as module
from fantasy_jax.models.attention import use_backend
from fantasy_jax.models.context_attention import choose_way, context_attention
from fantasy_jax.models.layers import scan_layers, stack_layers
from fantasy_jax.models.rope import rotary_table
from fantasy_jax.models.wan import SelfAttention, WanConfig
from fantasy_jax.performance.collectives import exchanges
from fantasy_jax.performance.flops import count_flops
from fantasy_jax.sharding import (
    MESH_AXES,
    MeshConfig,
    axis_size,
    batch_sharding,
    constrain,
    make_mesh,
    parameter_shardings,
    partition,
)

pytestmark = pytest.mark.networks

CONFIG = WanConfig(dim=32, num_heads=8)
BATCH, FRAMES = 4, 3
MESHES = [(1, 1, 8, 1), (1, 2, 2, 2), (2, 2, 2, 1)]
WAYS = ["gather", "all_to_all", "ring"]
SQUARE, WIDE = (4, 4), (5, 3)  # 16 tokens of space, and 15, which are padded


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def mesh_of(sizes):
    return make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)))


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def train(sizes, grid, way="auto"):
    """Output, loss and gradients of self-attention layers that are computed anew for the backward pass."""

    def make(rngs):
        return SelfAttention(CONFIG, rngs=rngs, dtype=jnp.float32, param_dtype=jnp.float32)

    graphdef, params = nnx.split(randomise(nnx.eval_shape(lambda: stack_layers(make, 2, rngs=nnx.Rngs(0)))))
    space = grid[0] * grid[1]
    rotary = rotary_table(FRAMES, *grid, CONFIG.dim // CONFIG.num_heads)
    target = draw(BATCH, space, FRAMES, CONFIG.dim, seed=1)

    def loss(params, x):
        padding = -space % axis_size("context")
        x, *tables = (
            jnp.pad(y, [(0, padding if size == space else 0) for size in y.shape]) for y in (x, *rotary)
        )

        def step(layer, x):
            return x + layer(constrain(x, "batch", "space", None, None), tuple(tables), space, way)

        x = scan_layers(step, nnx.merge(graphdef, params), x, saved_names=())[:, :space]
        return jnp.mean((x - target) ** 2), x

    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        shardings = parameter_shardings(params, mesh), batch_sharding(mesh)
        given = jax.device_put((params, draw(BATCH, space, FRAMES, CONFIG.dim)), shardings)
        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), out_shardings=(None, shardings))
        (value, heard), gradients = run(*given)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(gradients)[0]}
    return {"heard": heard, "loss": value} | named


on_one_device = functools.cache(functools.partial(train, (1, 1, 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grid", [SQUARE, WIDE], ids=str)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_way_trains_as_one_device_does(sizes, grid, way, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES", 5)  # several parts, and no multiple of them
    found = train(sizes, grid, way)
    assert len(found) == 13  # and of queries, keys, values, outputs, norms and what goes in
    for name, expected in on_one_device(grid).items():
        assert relative(found[name], expected) < 1e-5, name


def attend(sizes, way, dtype=jnp.float32, *, length=160, kv_length=150, heads=8, width=16):
    """Self-attention and its gradients, compiled and run; and the program."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, partition("batch", "space", "heads", None))
        shape = (BATCH, length, heads, width)
        q, k, v, weights = (jax.device_put(draw(*shape, seed=i, dtype=dtype), cut) for i in range(4))

        def total(q, k, v):
            heard = context_attention(q, k, v, kv_length=kv_length, way=way)
            return (heard * weights).astype(jnp.float32).sum(), heard

        run = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), out_shardings=((cut, cut, cut), cut))
        compiled = run.lower(q, k, v).compile()
        gradients, heard = compiled(q, k, v)
        return (heard, *gradients), compiled.as_text()


@pytest.mark.parametrize("way", ["gather", "all_to_all"])
def test_kernels_attend_on_each_device(way):
    expected, _ = attend((1, 1, 1, 1), way, width=128)
    with use_backend("splash_interpreted"):
        found, program = attend((1, 2, 2, 2), way, width=128)
    assert len(exchanges(program)) == (2 if way == "gather" else 1)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 5e-6


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_keeps_the_softmax_in_float32(way):
    expected, _ = attend((1, 1, 1, 1), way)
    found, _ = attend((1, 2, 2, 2), way, jnp.bfloat16)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert relative(one.astype(jnp.float32), other) < 1.5e-2


@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_what_every_way_sends(sizes, way):
    _, program = attend(sizes, way)
    _, _, context, tensor = sizes
    whole = 4 * BATCH // (sizes[0] * sizes[1]) * 160 * 8 // tensor * 16
    found = {kind: (exchange.count, exchange.bytes) for kind, exchange in exchanges(program).items()}
    # Forward and backward, and their gradients, which must come home. Of two devices the compiler sees that
    # it has sent them before.
    ring = (1 if context == 2 else 2) * 2 * (context - 1) + 2 * context
    sent = {
        "gather": {"all-gather": (2, 2 * whole), "reduce-scatter": (2, 2 * whole)},
        "all_to_all": {"all-to-all": (8, 8 * whole // context)},
        "ring": {"collective-permute": (ring, ring * whole // context)},
    }
    assert found == sent[way]


def test_operations_are_the_same_whichever_way():
    shape = jax.ShapeDtypeStruct((BATCH, 160, 8, 16), jnp.float32)
    for sizes in MESHES:
        with jax.set_mesh(mesh_of(sizes)):
            for way in WAYS:
                attend = functools.partial(context_attention, way=way)
                assert count_flops(attend, shape, shape, shape) == 4 * BATCH * 160 * 160 * 8 * 16


@pytest.mark.parametrize(
    ("way", "context", "heads", "gibibytes", "chosen"),
    [
        ("auto", 4, 40, 0.4, "all_to_all"),
        ("auto", 2, 40, 0.4, "gather"),  # as many bytes in half as many exchanges
        ("auto", 2, 40, 3, "all_to_all"),
        ("auto", 16, 40, 0.4, "gather"),
        ("auto", 16, 40, 3, "ring"),
        ("ring", 4, 40, 0.4, "ring"),
        ("gather", 4, 40, 3, "gather"),
    ],
)
def test_the_way_follows_from_the_sizes(way, context, heads, gibibytes, chosen):
    assert choose_way(way, context, heads, int(gibibytes * 2**30)) == chosen


def test_what_cannot_be_is_one_line():
    with pytest.raises(
        ConfigError, match="the 4 heads of a device cannot be shared by context 8; use"
    ) as error:
        attend((1, 1, 8, 1), "all_to_all", heads=4)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is 'rings'; use one of 'auto', 'gather', 'all_to_all', 'ring'"):
        build(MeshConfig, {"context_parallelism": "rings"}, "mesh")


def test_the_choice_is_logged_once(caplog):
    module._log.cache_clear()
    shape = jax.ShapeDtypeStruct((BATCH, 160, 8, 16), jnp.float32)
    with caplog.at_level(logging.INFO, logger=module.__name__), jax.set_mesh(make_mesh(context=8)):
        for way in ("auto", "all_to_all"):
            jax.eval_shape(functools.partial(context_attention, way=way), shape, shape, shape)
    assert [record.getMessage() for record in caplog.records] == [
        "self-attention of (4, 160, 8, 16) over context 8: all_to_all"
    ]
