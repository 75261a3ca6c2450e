"""What runs on TPUs, compiled for real slices by the real compiler, on a machine that has none."""

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
from fantasy_jax.models.attention import attention, use_backend
from fantasy_jax.sharding import make_mesh, partition

slice_ = topologies.get_topology_desc(platform="tpu", topology_name="{topology}")
mesh = make_mesh(data=2, context=2, tensor=2, devices=slice_.devices[:8])

def array(length, *dimensions):
    sharding = NamedSharding(mesh, partition(*dimensions))
    return jax.ShapeDtypeStruct((2, length, 4, 128), jnp.bfloat16, sharding=sharding)

def total(q, k, v):
    return (attention(q, k, v, kv_lengths=jnp.array([4000, 3990])).astype(jnp.float32) ** 2).sum()

q, k = array(4096, "batch", "space", "heads", None), array(4000, "batch", None, "heads", None)
with jax.set_mesh(mesh), use_backend("splash"):
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k).compile()
print(compiled.as_text().count("tpu_custom_call"), "kernels")
"""


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_splash_attention_compiles_for_a_slice(topology):
    if not HAS_COMPILER:
        assert "CI" not in os.environ, "CI installs the extra `tpu`"
        pytest.skip("libtpu is not installed; pip install '.[tpu]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    program = [sys.executable, "-c", PROGRAM.format(topology=topology)]
    result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[0]) >= 3  # forward, and backward for queries and for keys
