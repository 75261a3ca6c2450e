"""The miniatures' audio and expression adapters: queries and keys are rotated by their time.

A large wav2vec2's features carry their position, those of a small one hardly do. The tokens of an expression
have none: which of a latent frame's four video frames they belong to follows from those of its neighbours
only, if at all. The released weights have no such rotation.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig, AudioAttention
from fantasy_jax.models.adapters.expression import ExpressionAdapter, ExpressionAdapterConfig
from fantasy_jax.models.condition import Condition, KVProjection, select_row
from fantasy_jax.models.rope import rotate, time_table
from fantasy_jax.models.windows import window_ranges
from fantasy_jax.typing import Array, Float, Int, Leaf
from fantasy_jax.video import TEMPORAL_FACTOR

_FRAME = 2.0
"""Time of a video frame of expressions; for audio at 25 frames per second it is the same, two tokens."""


@dataclass(frozen=True)
class RotaryAudioAdapterConfig(AudioAdapterConfig):
    """Sizes of the adapter."""


@dataclass(frozen=True)
class RotaryExpressionAdapterConfig(ExpressionAdapterConfig):
    """Sizes of the adapter."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TimedCondition(Condition):
    """A condition whose tokens have a time.

    Attributes:
        frame_times: Times of the latent frames, `[B, F]`, from the start of the clip, in the adapter's unit.
        token_times: Times of the tokens, in the same unit; the shape is that of `tokens` without the width.
    """

    frame_times: Leaf = None
    token_times: Leaf = None

    def at_frames(self, start: Int[Array, ""], count: int, row: Int[Array, ""]) -> "TimedCondition":
        """As of every condition, with the times of these latent frames."""
        frame_times, token_times = (select_row(times, row) for times in (self.frame_times, self.token_times))
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count)
        if token_times.ndim > 1:
            token_times = cut(token_times, axis=token_times.ndim - 2)
        plain = super().at_frames(start, count, row)
        return replace(plain, frame_times=cut(frame_times), token_times=token_times)


class RotaryKVProjection(KVProjection):
    """Key and value projections whose queries and keys are rotated by their time."""

    def keys_and_values(
        self, condition: TimedCondition
    ) -> tuple[Float[Array, "B *n L N K"], Float[Array, "B *n L N K"]]:
        """Rotated keys, and values."""
        k, v = super().keys_and_values(condition)
        return rotate(k, *time_table(condition.token_times, k.shape[-1])), v

    def positioned_queries(
        self, q: Float[Array, "B S F N K"], condition: TimedCondition
    ) -> Float[Array, "B S F N K"]:
        """Rotated queries."""
        return rotate(q, *time_table(condition.frame_times[:, None], q.shape[-1]))


class RotaryAudioAdapter(AudioAdapter):
    """The audio adapter with rotary time in queries and keys."""

    kv_projection = RotaryKVProjection
    least_half = 0  # its weights were trained at 25 frames per second, with what the official rule gives

    def condition(
        self,
        features: Float[Array, "B *P A C"],
        num_frames: int,
        *,
        scale: float | Float[Array, " B"] = 1.0,
        attention: AudioAttention = "frame",
        expand: int = 4,
    ) -> TimedCondition:
        """As of the audio adapter, with the times of latent frames and tokens."""
        settings = {"scale": scale, "attention": attention, "expand": expand}
        plain = super().condition(features, num_frames, **settings)
        num_tokens = features.shape[-2]
        times = np.arange(num_tokens)
        if attention == "frame":
            ranges = window_ranges(num_tokens, num_frames, expand=expand, least_half=self.least_half)
            times = np.maximum(ranges[:, :1], 0) + np.arange(plain.tokens.shape[-2])
        return timed(plain, times + 0.5, num_frames, num_tokens / num_frames)


class RotaryExpressionAdapter(ExpressionAdapter):
    """The expression adapter with rotary time in queries and keys."""

    kv_projection = RotaryKVProjection

    def condition(
        self,
        features: Float[Array, "B P T M"],
        num_frames: int,
        *,
        scale: float | Float[Array, " B"] = 1.0,
    ) -> TimedCondition:
        """As of the expression adapter, with the times of latent frames and tokens."""
        plain = super().condition(features, num_frames, scale=scale)
        per_frame = self.config.tokens_per_frame
        ranges = window_ranges(per_frame * num_frames, num_frames)
        frames = (np.maximum(ranges[:, :1], 0) + np.arange(plain.tokens.shape[-2])) // per_frame
        return timed(plain, _FRAME * (frames + 0.5), num_frames, _FRAME)


def timed(
    plain: Condition, times: Float[np.ndarray, "*n L"], num_frames: int, frame: float
) -> TimedCondition:
    """A condition with the times of its tokens and of the latent frames.

    Args:
        plain: The condition.
        times: Middles of the tokens in time.
        num_frames: Video frames T = 4k + 1.
        frame: Time of a video frame.
    """
    # Latent frame 0 is video frame 0, latent frame i the four from 4i - 3 on.
    middles = frame * np.array([0.5, *range(3, num_frames, TEMPORAL_FACTOR)])
    shapes = (len(plain.tokens), middles.size), plain.tokens.shape[:-1]
    frame_times, token_times = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)
        for x, shape in zip((middles, times), shapes, strict=True)
    )
    return TimedCondition(**vars(plain), frame_times=frame_times, token_times=token_times)
