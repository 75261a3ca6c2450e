"""Flags of XLA with which programs compile soonest on CPUs; compiling takes most of the time of tests."""

from importlib.metadata import version


def quick_flags(devices: int = 1, *, libtpu: bool = False) -> str:
    """The value of `XLA_FLAGS` for a number of virtual devices.

    LLVM's optimizations would double the time. Code that is split for several threads and, in JAX 0.10,
    fusions that are emitted through MLIR take longer, too; later versions have no other emitters.

    Args:
        devices: Virtual devices.
        libtpu: Whether the process loads libtpu, which ends it at a flag that it does not know.
    """
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if version("jaxlib").startswith("0.10.") and not libtpu:
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
