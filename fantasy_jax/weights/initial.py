"""Stores of random weights, with which everything but the result can be tried."""

import math
from pathlib import Path

import jax.numpy as jnp

from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.disk import check_space, free_bytes
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import lock_folder
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import RandomLoader
from fantasy_jax.system.registry import component_of
from fantasy_jax.weights.store import save_network


def init_store(output: str | Path, model: ModelConfig, *, seed: int = 0) -> list[str]:
    """Writes a store of networks with random initial weights, one network at a time.

    Each `component.json` says that the weights are random, and so does whatever loads them.

    Args:
        output: The store; it must not hold a network of the model.
        model: All sizes.
        seed: Seed of the weights.

    Returns:
        A summary of each network, one line each.

    Raises:
        ConfigError: Another process writes to the store.
        WeightsError: The store holds a network already, or the disk has not enough space.
    """
    output = Path(output)
    rows = {slot: component_of(sizes) for slot, sizes in model.networks.items()}
    dtypes = {slot: jnp.dtype(row.dtype or model.dtype) for slot, row in rows.items()}
    if held := next((slot for slot in rows if (output / slot).exists()), None):
        raise WeightsError(f"{output / held}: exists already; choose another --output")
    bytes_of = {}
    for slot, row in rows.items():
        shapes = [x.shape for x in flat_parameters(row.abstract(model.networks[slot])).values()]
        bytes_of[slot] = sum(map(math.prod, shapes)) * dtypes[slot].itemsize
    check_space(output, sum(bytes_of.values()), free_bytes(output))
    lines = []
    with lock_folder(output):
        for slot, row in rows.items():
            network = RandomLoader(seed)(row, model.networks[slot], dtypes[slot], None)
            save_network(output / slot, network, component=row.name, random=True)
            lines.append(f"{output / slot}: {bytes_of[slot] / 2**20:.1f} MiB of {dtypes[slot]}, random")
    return lines
