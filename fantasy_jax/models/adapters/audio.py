"""The FantasyTalking audio adapter: speech features to tokens, and keys and values for every block.

Source: arXiv 2504.04842, section 3.2, and fantasy-talking, `model.py`. The released weights have no bias and
no norm on the keys. Values are zero-initialised, so that a new adapter is a no-op; keys, which the released
code initialises with zeros too, are random: keys and values that are both zero have no gradient.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Depth, Settings, Width
from fantasy_jax.models.adapters.base import Adapter
from fantasy_jax.models.condition import Condition, KVProjection, zero_init_kv_layers
from fantasy_jax.models.layers import LayerNorm
from fantasy_jax.models.windows import split_windows, window_ranges
from fantasy_jax.typing import Array, DType, Float
from fantasy_jax.video import VideoConfig, latent_frames

AudioAttention = Literal["clip", "frame"]
"""`clip`: every video token attends to the audio of the whole clip (the paper's first training stage);
`frame`: each latent frame attends to its own window (second stage, and the released weights)."""


@dataclass(frozen=True)
class AudioAdapterConfig(Settings):
    """Sizes of the adapter; the defaults are the released ones, for wav2vec2-base and the 14B transformer.

    Attributes:
        feature_width: Width of the speech features.
        token_width: Width of the audio tokens.
        width: Width D of the transformer.
        num_heads: Attention heads of the transformer.
        num_layers: Blocks of the transformer.
    """

    feature_width: Width = 768
    token_width: Width = 2048
    width: Width = 5120
    num_heads: Width = 40
    num_layers: Depth = 40


class AudioAdapter(Adapter):
    """Turns speech features into tokens that the transformer's blocks attend to."""

    input = "audio"
    dropout_group = "audio"
    per_person = "several"
    kv_projection: ClassVar[type[KVProjection]] = KVProjection
    least_half: ClassVar[int] = 4
    """Tokens that a window has at least on each side of its middle. The official rule gives 4 up to 24 frames
    per second, at which the weights were trained; from 25 on it truncates 3.98 to 3."""

    @classmethod
    def input_shape(cls, config: AudioAdapterConfig, video: VideoConfig) -> tuple[int, ...]:
        """Shape `[A, C]` of the speech features of one sound."""
        return video.audio_tokens, config.feature_width

    def __init__(
        self,
        config: AudioAdapterConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the adapter; the values of all blocks are zero-initialised."""
        self.config = config
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.projection = nnx.Linear(config.feature_width, config.token_width, use_bias=False, **types)
        self.norm = LayerNorm(config.token_width, epsilon=1e-5, param_dtype=param_dtype, rngs=rngs)
        sizes = (config.token_width, config.width, config.num_heads, config.num_layers)
        self.layers = zero_init_kv_layers(*sizes, projection=self.kv_projection, **types)

    def tokens(self, features: Float[Array, "*n A C"]) -> Float[Array, "*n A D"]:
        """Projects speech features to audio tokens, float32."""
        return self.norm(self.projection(features))

    def condition(
        self,
        features: Float[Array, "B *P A C"],
        num_frames: int,
        *,
        scale: float | Float[Array, " B"] = 1.0,
        attention: AudioAttention = "frame",
        expand: int = 4,
    ) -> Condition:
        """Audio tokens for all video tokens, or a window of them for each latent frame.

        With several sounds, the tokens of the whole clip are repeated for each latent frame, because whose
        sound a video token attends to can differ between frames.

        Args:
            features: Speech features that span exactly `num_frames` video frames, `[B, A, C]`; or those of P
                sounds, one for each person, `[B, P, A, C]`.
            num_frames: Video frames T = 4k + 1.
            scale: Multiplier of the attended audio.
            attention: At clip level or at frame level.
            expand: Tokens added to a window on both sides.
        """
        tokens = self.tokens(features)
        if attention == "clip":
            if tokens.ndim == 4:
                tokens = jnp.repeat(tokens[:, :, None], latent_frames(num_frames), axis=2)
            return Condition(tokens, scale=scale)
        ranges = window_ranges(tokens.shape[-2], num_frames, expand=expand, least_half=self.least_half)
        windows, lengths = split_windows(tokens.reshape(-1, *tokens.shape[-2:]), ranges)
        windows = windows.reshape(*tokens.shape[:-2], *windows.shape[1:])
        lengths = jnp.broadcast_to(lengths, (tokens.shape[0], *lengths.shape))
        return Condition(windows, lengths, scale)
