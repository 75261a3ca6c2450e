"""Self-attention over several devices, against one device; and its collectives."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract, randomise, relative
from jax.sharding import NamedSharding

from fantasy_jax.config import build
from fantasy_jax.errors import ConfigError
from fantasy_jax.models import attention as attention_module
from fantasy_jax.models import context_attention as module
from fantasy_jax.models.attention import BACKENDS, Backend
from fantasy_jax.models.context_attention import choose_strategy, context_attention
from fantasy_jax.models.layers import scan_layers, stack_layers
from fantasy_jax.models.rope import rotary_table
from fantasy_jax.models.wan import SelfAttention, WanConfig
from fantasy_jax.performance.collectives import collectives
from fantasy_jax.performance.flops import model_flops
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

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

CONFIG = WanConfig(dim=32, num_heads=8)
BATCH, FRAMES = 4, 3
MESHES = [(1, 1, 8, 1), (1, 2, 2, 2), (2, 2, 2, 1)]
STRATEGIES = ["gather", "all_to_all"]
SQUARE, WIDE = (4, 4), (5, 3)  # 16 tokens of space, and 15, which are padded


def mesh_of(sizes):
    return make_mesh(**dict(zip(MESH_AXES, sizes, strict=True)))


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def train(sizes, grid, strategy="auto"):
    """Output, loss and gradients of self-attention layers that are rematerialised in the backward pass."""

    def make(rngs):
        return SelfAttention(CONFIG, rngs=rngs, dtype=jnp.float32, param_dtype=jnp.float32)

    graphdef, params = nnx.split(randomise(abstract(stack_layers, make, 2)))
    space = grid[0] * grid[1]
    rotary = rotary_table(FRAMES, *grid, CONFIG.dim // CONFIG.num_heads)
    target = draw(BATCH, space, FRAMES, CONFIG.dim, seed=1)

    def loss(params, x):
        padding = -space % axis_size("context")
        x, *tables = (
            jnp.pad(y, [(0, padding if size == space else 0) for size in y.shape]) for y in (x, *rotary)
        )

        def step(layer, x):
            return x + layer(constrain(x, "batch", "space", None, None), tuple(tables), space, strategy)

        x = scan_layers(step, nnx.merge(graphdef, params), x, remat_save_names=())[:, :space]
        return jnp.mean((x - target) ** 2), x

    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        shardings = parameter_shardings(params, mesh), batch_sharding(mesh)
        given = jax.device_put((params, draw(BATCH, space, FRAMES, CONFIG.dim)), shardings)
        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), out_shardings=(None, shardings))
        (value, output), gradients = run(*given)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(gradients)[0]}
    return {"output": output, "loss": value} | named


on_one_device = functools.cache(functools.partial(train, (1, 1, 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("grid", [SQUARE, WIDE], ids=str)
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_gradients_of_every_strategy_equal_those_of_one_device(sizes, grid, strategy):
    found = train(sizes, grid, strategy)
    assert len(found) == 13  # output, loss, and gradients of the parameters and of the input
    for name, expected in on_one_device(grid).items():
        assert relative(found[name], expected) < 1e-5, name


def attend(sizes, strategy, dtype=jnp.float32, *, length=160, kv_length=150, heads=8, width=16):
    """Output and gradients of self-attention, and the compiled program."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, partition("batch", "space", "heads", None))
        shape = (BATCH, length, heads, width)
        q, k, v, weights = (jax.device_put(draw(*shape, seed=i, dtype=dtype), cut) for i in range(4))

        def total(q, k, v):
            output = context_attention(q, k, v, kv_length=kv_length, strategy=strategy)
            return (output * weights).astype(jnp.float32).sum(), output

        run = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True), out_shardings=((cut, cut, cut), cut))
        compiled = run.lower(q, k, v).compile()
        gradients, output = compiled(q, k, v)
        return (output, *gradients), compiled.as_text()


@pytest.mark.parametrize("strategy", ["gather", "all_to_all"])
def test_the_splash_kernel_runs_on_each_device(strategy, monkeypatch):
    expected, _ = attend((1, 1, 1, 1), strategy, width=128)
    (splash,) = (backend for backend in BACKENDS if backend.name == "splash")
    interpreted = Backend("splash", "cpu", splash.supports, functools.partial(splash.run, interpret=True))
    monkeypatch.setattr(attention_module, "BACKENDS", (interpreted, *BACKENDS))
    found, program = attend((1, 2, 2, 2), strategy, width=128)
    assert len(collectives(program)) == (2 if strategy == "gather" else 1)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 5e-6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_computes_the_softmax_in_float32(strategy):
    expected, _ = attend((1, 1, 1, 1), strategy)
    found, _ = attend((1, 2, 2, 2), strategy, jnp.bfloat16)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert relative(one.astype(jnp.float32), other) < 1.5e-2


@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_collectives_of_every_strategy(sizes, strategy):
    _, program = attend(sizes, strategy)
    _, _, context, tensor = sizes
    whole = 4 * BATCH // (sizes[0] * sizes[1]) * 160 * 8 // tensor * 16
    found = {kind: (exchange.count, exchange.bytes) for kind, exchange in collectives(program).items()}
    # The collectives of the forward pass, and their transposes in the backward pass.
    sent = {
        "gather": {"all-gather": (2, 2 * whole), "reduce-scatter": (2, 2 * whole)},
        "all_to_all": {"all-to-all": (8, 8 * whole // context)},
    }
    assert found == sent[strategy]


def test_flops_do_not_depend_on_the_strategy():
    shape = jax.ShapeDtypeStruct((BATCH, 160, 8, 16), jnp.float32)
    for sizes in MESHES:
        with jax.set_mesh(mesh_of(sizes)):
            for strategy in STRATEGIES:
                attend = functools.partial(context_attention, strategy=strategy)
                assert model_flops(attend, shape, shape, shape) == 4 * BATCH * 160 * 160 * 8 * 16


@pytest.mark.parametrize(
    ("strategy", "context", "heads", "gibibytes", "chosen"),
    [
        ("auto", 4, 40, 0.4, "all_to_all"),
        ("auto", 2, 40, 0.4, "gather"),  # as many bytes in half as many collectives
        ("auto", 2, 40, 3, "all_to_all"),
        ("auto", 16, 40, 0.4, "gather"),
        ("auto", 16, 40, 3, "gather"),  # 16 devices cannot split 40 heads
        ("gather", 4, 40, 3, "gather"),
    ],
)
def test_the_strategy_follows_from_the_sizes(strategy, context, heads, gibibytes, chosen):
    assert choose_strategy(strategy, context, heads, int(gibibytes * 2**30)) == chosen


def test_impossible_strategies_are_config_errors():
    with pytest.raises(ConfigError, match="context_parallelism") as error:
        attend((1, 1, 8, 1), "all_to_all", heads=4)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="context_parallelism"):
        build(MeshConfig, {"context_parallelism": "ring"}, "mesh")


def test_the_choice_is_logged_once(caplog):
    module._log.cache_clear()
    shape = jax.ShapeDtypeStruct((BATCH, 160, 8, 16), jnp.float32)
    with caplog.at_level(logging.INFO, logger=module.__name__), jax.set_mesh(make_mesh(context=8)):
        for strategy in ("auto", "all_to_all"):
            jax.eval_shape(functools.partial(context_attention, strategy=strategy), shape, shape, shape)
    assert [record.getMessage() for record in caplog.records] == [
        "self-attention of (4, 160, 8, 16) over context 8: all_to_all"
    ]
