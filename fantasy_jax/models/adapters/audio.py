"""The FantasyTalking audio adapter: speech features to tokens, and keys and values for every block.

Source: arXiv 2504.04842, section 3.2, and fantasy-talking, `model.py`. The released weights have no bias, no
norm on the keys. Values start from zero, so that a new adapter leaves the transformer as it was; keys, which
the released code has at zero too, are drawn: from zero they learn nothing before the values have.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.models.condition import Condition, silent_layers
from fantasy_jax.models.layers import LayerNorm
from fantasy_jax.typing import Array, DType, Float, Int


@dataclass(frozen=True)
class AudioAdapterConfig:
    """Sizes of the adapter; the defaults are the released ones, for wav2vec2-base and the 14B transformer.

    Attributes:
        feature_width: Of speech features.
        token_width: Of audio tokens.
        width: The transformer's.
        num_heads: The transformer's.
        num_layers: The transformer's.
        rotary: Whether queries and keys are turned by their time. The released weights have no such thing:
            a large wav2vec2's features carry their place, those of a small one hardly do.
    """

    feature_width: int = 768
    token_width: int = 2048
    width: int = 5120
    num_heads: int = 40
    num_layers: int = 40
    rotary: bool = False


class AudioAdapter(nnx.Module):
    """Turns speech features into what the transformer's blocks attend to."""

    def __init__(
        self,
        config: AudioAdapterConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the adapter; the values of all blocks start from zero."""
        self.config = config
        self.projection = nnx.Linear(
            config.feature_width,
            config.token_width,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = LayerNorm(config.token_width, epsilon=1e-5, param_dtype=param_dtype, rngs=rngs)
        self.layers = silent_layers(
            config.token_width,
            config.width,
            config.num_heads,
            config.num_layers,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )

    def tokens(self, features: Float[Array, "B A C"]) -> Float[Array, "B A D"]:
        """Speech features to audio tokens, float32."""
        return self.norm(self.projection(features))

    def clip_level(
        self, features: Float[Array, "B A C"], num_frames: int, *, scale: float | Float[Array, " B"] = 1.0
    ) -> Condition:
        """Every video token hears the whole clip (the paper's first training stage).

        Args:
            features: Speech features that span exactly `num_frames` video frames.
            num_frames: Video frames T = 4k + 1.
            scale: Weight of the audio.
        """
        tokens = self.tokens(features)
        return Condition(tokens, None, scale, self._times(tokens, num_frames, np.arange(tokens.shape[1])))

    def frame_level(
        self,
        features: Float[Array, "B A C"],
        num_frames: int,
        *,
        expand: int = 4,
        scale: float | Float[Array, " B"] = 1.0,
    ) -> Condition:
        """Each latent frame hears its own window (second stage, and sampling).

        Args:
            features: Speech features that span exactly `num_frames` video frames.
            num_frames: Video frames T = 4k + 1.
            expand: Tokens added to a window on both sides.
            scale: Weight of the audio.
        """
        tokens = self.tokens(features)
        ranges = window_ranges(tokens.shape[1], num_frames, expand=expand)
        windows, lengths = split_windows(tokens, ranges)
        moments = np.maximum(ranges[:, :1], 0) + np.arange(windows.shape[2])
        lengths = jnp.broadcast_to(lengths, (tokens.shape[0], *lengths.shape))
        return Condition(windows, lengths, scale, self._times(tokens, num_frames, moments))

    def _times(
        self, tokens: Float[Array, "B A D"], num_frames: int, moments: Int[np.ndarray, "*n"]
    ) -> tuple[Array, Array] | None:
        """When latent frames and tokens are, in tokens from the clip's begin; None if not needed."""
        if not self.config.rotary:
            return None
        per_frame = tokens.shape[1] / num_frames
        # Latent frame 0 is video frame 0, latent frame i the four from 4i - 3 on. A token has length 1.
        middles = per_frame * np.array([0.5, *range(3, num_frames, 4)]) - 0.5
        return tuple(
            jnp.broadcast_to(jnp.asarray(times, jnp.float32), (tokens.shape[0], *times.shape))
            for times in (middles, moments)
        )


def window_ranges(num_tokens: int, num_frames: int, *, expand: int = 0) -> Int[np.ndarray, "F 2"]:
    """First and last audio token, both included, that each latent frame hears; may reach outside the clip.

    Source: fantasy-talking, `model.py`, `split_audio_sequence`; Python floats and truncation as there.

    Args:
        num_tokens: Audio tokens A of the whole clip.
        num_frames: Video frames T = 4k + 1.
        expand: Tokens added on both sides.
    """
    per_frame = num_tokens / num_frames
    half = int(per_frame * 4 / 2)
    centers = [
        int((per_frame * ((i - 1) * 4 + 1) + per_frame * (i * 4 + 1)) / 2) - 1
        for i in range(1, (num_frames - 1) // 4 + 1)
    ]
    ranges = [(center - half, center + half) for center in centers]
    # The first latent frame is one video frame, not four: its window ends where the second one starts.
    last = ranges[0][0] if ranges else half
    ranges.insert(0, (last - 2 * half, last))
    return np.array(ranges) + np.array([-expand, expand])


def split_windows(
    tokens: Float[Array, "B A D"], ranges: Int[np.ndarray, "F 2"]
) -> tuple[Float[Array, "B F L D"], Int[Array, " F"]]:
    """Cuts windows out of the tokens; those that reach outside the clip are padded with zeros on the right.

    Returns:
        The windows, and how many tokens of each are real.
    """
    first = np.maximum(ranges[:, 0], 0)
    lengths = np.maximum(np.minimum(ranges[:, 1], tokens.shape[1] - 1) - first + 1, 0)
    offsets = np.arange(ranges[0, 1] - ranges[0, 0] + 1)
    real = offsets < lengths[:, None]
    positions = np.where(real, first[:, None] + offsets, 0)
    windows = jnp.where(real[..., None], tokens[:, positions], 0)
    return windows, jnp.asarray(lengths, jnp.int32)
