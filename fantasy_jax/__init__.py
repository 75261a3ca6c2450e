"""Talking and acting portraits in JAX: FantasyTalking on the Wan2.1 video diffusion transformer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fantasy_jax.pipelines.talking import FantasyTalkingPipeline

__version__ = "0.1.0"
__all__ = ["FantasyTalkingPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the pipelines when they are asked for, so that `import fantasy_jax` stays light."""
    if name == "FantasyTalkingPipeline":
        from fantasy_jax.pipelines.talking import FantasyTalkingPipeline

        return FantasyTalkingPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
