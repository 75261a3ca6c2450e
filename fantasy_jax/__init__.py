"""Talking and acting portraits in JAX: FantasyTalking and FantasyPortrait on Wan2.1's video transformer."""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fantasy_jax.pipelines.dubbing import FantasyDubbingPipeline
    from fantasy_jax.pipelines.portrait import FantasyPortraitPipeline
    from fantasy_jax.pipelines.talking import FantasyTalkingPipeline

__version__ = "0.1.0"
__all__ = ["FantasyDubbingPipeline", "FantasyPortraitPipeline", "FantasyTalkingPipeline", "__version__"]

_MODULES = {
    "FantasyDubbingPipeline": "dubbing",
    "FantasyPortraitPipeline": "portrait",
    "FantasyTalkingPipeline": "talking",
}

LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu otherwise queries from a TPU host; the last lets several processes compile at once."""
_GOOGLE = "0x1ae0"
"""PCI vendor of TPUs."""


def _describe_absent_tpu() -> None:
    """Keeps libtpu, which JAX loads wherever it is installed, from printing errors where there is no TPU."""
    devices = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    if devices or any(path.read_text().strip() == _GOOGLE for path in vendors):
        return
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


_describe_absent_tpu()


def __getattr__(name: str) -> Any:
    """Imports the pipelines when they are asked for, so that `import fantasy_jax` stays light."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"fantasy_jax.pipelines.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
