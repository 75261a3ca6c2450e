"""Pipelines by the task of a config."""

from ml_collections import ConfigDict

from fantasy_jax.errors import ConfigError
from fantasy_jax.pipelines.base import Pipeline
from fantasy_jax.pipelines.portrait import FantasyPortraitPipeline
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline

PIPELINES: dict[str, type[Pipeline]] = {
    "talking": FantasyTalkingPipeline,
    "miniature": FantasyTalkingPipeline,
    "portrait": FantasyPortraitPipeline,
    "miniature_portrait": FantasyPortraitPipeline,
}


def pipeline_of(config: ConfigDict) -> type[Pipeline]:
    """The class that samples with a config.

    Raises:
        ConfigError: The config has another task.
    """
    if str(config.get("task")) not in PIPELINES:
        raise ConfigError(f"task is {config.get('task')!r}; it must be one of {', '.join(PIPELINES)}")
    return PIPELINES[config.task]
