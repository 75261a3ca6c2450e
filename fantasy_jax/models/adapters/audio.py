"""The FantasyTalking audio adapter: speech features to tokens, and keys and values for every block.

Source: arXiv 2504.04842, section 3.2, and fantasy-talking, `model.py`. The released weights have no bias, no
norm on the keys, and start from zero, so that a new adapter leaves the transformer as it was.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.models.condition import Condition, KeyValue
from fantasy_jax.models.layers import LayerNorm, stack_layers
from fantasy_jax.typing import Array, DType, Float, Int


@dataclass(frozen=True)
class AudioAdapterConfig:
    """Sizes of the adapter; the defaults are the released ones, for wav2vec2-base and the 14B transformer."""

    feature_width: int = 768
    token_width: int = 2048
    width: int = 5120
    num_heads: int = 40
    num_layers: int = 40


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
        """Builds the adapter; keys and values of all blocks start from zero."""
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
        self.layers = stack_layers(
            lambda rngs: KeyValue(
                config.token_width,
                config.width,
                config.num_heads,
                use_bias=False,
                norm_epsilon=None,
                kernel_init=nnx.initializers.zeros,
                rngs=rngs,
                dtype=dtype,
                param_dtype=param_dtype,
            ),
            config.num_layers,
            rngs=rngs,
        )

    def tokens(self, features: Float[Array, "B A C"]) -> Float[Array, "B A D"]:
        """Speech features to audio tokens, float32."""
        return self.norm(self.projection(features))

    def clip_level(
        self, features: Float[Array, "B A C"], *, scale: float | Float[Array, " B"] = 1.0
    ) -> Condition:
        """Every video token hears the whole clip (the paper's first training stage)."""
        return Condition(self.tokens(features), scale=scale)

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
        windows, lengths = split_windows(tokens, window_ranges(tokens.shape[1], num_frames, expand=expand))
        return Condition(windows, jnp.broadcast_to(lengths, (tokens.shape[0], *lengths.shape)), scale)


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
