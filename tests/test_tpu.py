"""Kernels and collectives of attention, compiled by libtpu for TPU slices that are not attached."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None

PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from fantasy_jax.models.attention import attention
from fantasy_jax.sharding import make_mesh, partition

slice_ = topologies.get_topology_desc(platform="tpu", topology_name="{topology}")
mesh = make_mesh(data=2, context=2, tensor=2, devices=slice_.devices[:8])

def array(length, *dimensions):
    sharding = NamedSharding(mesh, partition(*dimensions))
    return jax.ShapeDtypeStruct((2, length, 4, 128), jnp.bfloat16, sharding=sharding)

def total(q, k, v):
    return (attention(q, k, v, kv_lengths=jnp.array([4000, 3990])).astype(jnp.float32) ** 2).sum()

q, k = array(4096, "batch", "space", "heads", None), array(4000, "batch", None, "heads", None)
with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k).compile()
print(compiled.as_text().count("tpu_custom_call"), "kernels")
"""

ACROSS = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding
from fantasy_jax.models.context_attention import context_attention
from fantasy_jax.performance.ahead import slice_devices
from fantasy_jax.performance.collectives import collectives
from fantasy_jax.sharding import make_mesh, partition

mesh = make_mesh(data=2, context=4, devices=slice_devices("v5e:2x4"))
x = jax.ShapeDtypeStruct(
    (2, 1024, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, partition("batch", "space", "heads", None))
)

def total(q, k, v):
    return (context_attention(q, k, v, kv_length=1000, strategy="{strategy}").astype(jnp.float32) ** 2).sum()

with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(total, (0, 1, 2)), out_shardings=x.sharding).lower(x, x, x).compile().as_text()
print({{kind: found.bytes for kind, found in collectives(program).items()}})
print(program.count("tpu_custom_call"), "kernels")
"""


EIGHT_BIT = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from fantasy_jax.models.eight_bit import multiply_eight_bit, multiply_exact
from fantasy_jax.performance.ahead import slice_devices

device = SingleDeviceSharding(slice_devices("v6e:2x2")[0])
x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=device)
weight = jax.ShapeDtypeStruct((384, 512), jnp.int8, sharding=device)
for multiply in (multiply_eight_bit, multiply_exact):
    compiled = jax.jit(multiply).lower(x, weight).compile()
    text = compiled.as_text()
    lines = [line for line in text.splitlines() if " = " in line]
    types = {line.split()[0]: line.split()[2].partition("[")[0] for line in lines}
    (product,) = (line for line in lines if " convolution(" in line)
    operands = product.partition("convolution(")[2].partition(")")[0].split(", ")
    print(product.split()[2].partition("[")[0], *(types[operand] for operand in operands))
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


def run(program):
    """Runs a program in a process of its own and returns the lines that it prints."""
    if not HAS_COMPILER:
        assert "CI" not in os.environ, "CI installs the extra `tpu`"
        pytest.skip("libtpu is not installed; pip install '.[tpu]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


@pytest.mark.parametrize("topology", ["v5e:2x4", pytest.param("v6e:2x4", marks=pytest.mark.slow)])
def test_splash_attention_compiles_for_a_slice(topology):
    (printed,) = run(PROGRAM.format(topology=topology))
    assert int(printed.split()[0]) == 2  # forward, and backward


@pytest.mark.parametrize(
    ("strategy", "sent"),
    [
        # Gradients of keys and values are reduced to the shard that each device owns.
        ("gather", {"all-gather": 2.0, "reduce-scatter": 2.0}),
        ("all_to_all", {"all-to-all": 8 / 4}),
    ],
)
def test_every_strategy_compiles_for_a_slice(strategy, sent):
    found, kernels = run(ACROSS.format(strategy=strategy))
    sequence = 1024 * 4 * 128 * 2
    assert ast.literal_eval(found) == {kind: int(times * sequence) for kind, times in sent.items()}
    assert int(kernels.split()[0]) == 2


def test_products_with_weights_of_eight_bits_are_not_converted_first():
    eight_bit, _, exact, temporaries = run(EIGHT_BIT)
    assert eight_bit == "s32 s8 s8"
    assert exact == "bf16 bf16 s8"
    assert int(temporaries) < 384 * 512 * 2, "the weights in 16 bits are not in memory"


def test_chips_of_slices_are_known():
    # The cores of a chip are one device on v4 and v5p, and two on v7x.
    topologies = {
        ("v4", 4): "v4:2x2x1", ("v5e", 8): "v5e:2x4", ("v5p", 4): "v5p:2x2x1", ("v6e", 8): "v6e:2x4",
        ("v7x", 8): "v7x:2x2x1",
    }  # fmt: skip
    program = """
from fantasy_jax.performance.ahead import slice_devices
from fantasy_jax.performance.chips import chip_of
print([(chip_of(slice_devices(name)[0]).name, len(slice_devices(name))) for name in {names}])
"""
    (printed,) = run(program.format(names=list(topologies.values())))
    assert ast.literal_eval(printed) == list(topologies)
