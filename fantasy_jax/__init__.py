"""Talking and acting portraits in JAX: FantasyTalking and FantasyPortrait on Wan2.1's video transformer."""

import importlib
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


def __getattr__(name: str) -> Any:
    """Imports the pipelines when they are asked for, so that `import fantasy_jax` stays light."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"fantasy_jax.pipelines.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
