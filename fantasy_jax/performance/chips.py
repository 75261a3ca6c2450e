"""Peak rates of known accelerators, per device of JAX, from their vendors' pages."""

from dataclasses import dataclass

import jax

from fantasy_jax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak rates of a chip.

    Attributes:
        name: Common name.
        flops: Dense bfloat16 operations per second.
        memory: High-bandwidth memory, in bytes.
        memory_rate: Memory bandwidth, in bytes per second.
        link_rate: Bandwidth to other chips, in bytes per second, over all links and both directions.
    """

    name: str
    flops: float
    memory: int
    memory_rate: float
    link_rate: float


# cloud.google.com/tpu/docs: system architecture of each; nvidia.com: data sheets, without sparsity.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 300e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1640e9, 448e9),
    # A chip has two cores, which are devices of their own; the figures are those of a core.
    "TPU7x": Chip("v7x", 1153.5e12, 96 * GIB, 3690e9, 300e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 312e12, 40 * GIB, 1555e9, 600e9),
    "NVIDIA A100 80GB PCIe": Chip("A100 PCIe", 312e12, 80 * GIB, 1935e9, 600e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80 * GIB, 2039e9, 600e9),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GIB, 2000e9, 600e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80 * GIB, 3350e9, 900e9),
    "NVIDIA H200": Chip("H200", 989e12, 141 * 10**9, 4800e9, 900e9),
}
"""Chips by JAX's `device_kind`."""


def chip_of(device: jax.Device) -> Chip:
    """Returns the peak rates of a device.

    Raises:
        ConfigError: They are not in `CHIPS`.
    """
    if device.device_kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise ConfigError(f"device {device.device_kind!r}: its peak rates are unknown; known are {known}")
    return CHIPS[device.device_kind]
