"""Host memory of loading a transformer of full width for a mesh: blocks of full size, all of zeros.

As a program it writes a store with a few of the forty blocks and loads it for eight pretended devices:

    .venv/bin/python tests/full_size_loading.py FOLDER --layers 4

The pretended devices are in host memory, too, so the arrays themselves are subtracted from the peak: what
is left is what a host needs beside its shards. It does not depend on the number of blocks.
"""

import argparse
import os
import re
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.sharding import make_mesh
from fantasy_jax.system.registry import find_component
from fantasy_jax.weights.loading import load_network
from fantasy_jax.weights.store import NetworkRecord, items, write

COMPONENT = "wan2.1_i2v_dit"


def write_zeros(folder: Path, config: WanConfig) -> None:
    """A stored transformer of zeros, which take hardly any space on the disk."""
    component = find_component(COMPONENT)
    places = items(component, config)
    shapes = {path: spec.shape for path, spec in flat_parameters(component.abstract(config)).items()}

    def make(item: str) -> dict[str, np.ndarray]:
        return {
            path: np.zeros(shapes[path] if layer is None else shapes[path][1:], jnp.bfloat16)
            for path, layer in places[item].items()
        }

    write(folder, NetworkRecord(COMPONENT, "", asdict(config), "bfloat16"), places, make)


class PeakMemory:
    """The peak of this process' anonymous memory while it is in force, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    config = replace(WanConfig(), num_layers=arguments.layers)
    folder = arguments.folder / f"transformer_{arguments.layers}"
    if not folder.exists():
        write_zeros(folder, config)
    mesh = make_mesh(fsdp=2, tensor=4)
    start = time.perf_counter()
    with jax.set_mesh(mesh), PeakMemory() as memory:
        network = load_network(folder, config, dtype=jnp.bfloat16, mesh=mesh)
        leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(network)))
    arrays = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    peak = memory.peak - memory.before
    print(
        f"{arguments.layers} blocks: arrays {arrays / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB, "
        f"beside the arrays {(peak - arrays) / 2**30:.2f} GiB, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
