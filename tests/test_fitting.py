"""What is proposed where a program does not fit a slice."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.performance.chips import GIB
from fantasy_jax.performance.fitting import setups_that_fit
from fantasy_jax.performance.program import Program
from fantasy_jax.sharding import make_mesh


def program(spec, batch_size):
    weights = jax.ShapeDtypeStruct(
        (2**12, 2**10), jnp.float32, sharding=NamedSharding(make_mesh(fsdp=8), spec)
    )
    return Program("step", print, (weights,), 0, 0, print, batch_size)


def test_setups_of_a_training_step():
    # As of the 14B model's adapters on 16 chips of 32 GiB: a clip each.
    mesh = {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}
    given = program(PartitionSpec("fsdp"), 16), mesh, int(2.7 * GIB), int(40.9 * GIB)
    here, more = setups_that_fit(*given, 32 * GIB)
    assert (
        str(here) == "16 chips with mesh fsdp 8 x context 2 and 2 times the grad_accum_steps: 5.4 + 20.4 GiB"
    )
    assert str(more) == "32 chips with mesh fsdp 16 x context 2: 2.7 + 20.4 GiB"
    (more,) = setups_that_fit(*given, 16 * GIB)  # half a clip's memory and twice the arguments are too much
    assert str(more) == "64 chips with mesh fsdp 16 x context 4: 2.7 + 10.2 GiB"
    assert setups_that_fit(*given, 2 * GIB) == []


def test_setups_of_a_sampling_program():
    mesh = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    given = program(PartitionSpec("fsdp", "tensor"), None), mesh, 32 * GIB, 4 * GIB
    (more,) = setups_that_fit(*given, 32 * GIB)
    assert more.mesh["fsdp"] * more.mesh["tensor"] == 2
    assert more.argument_bytes == 16 * GIB
