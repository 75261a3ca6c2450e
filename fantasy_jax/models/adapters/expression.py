"""The FantasyPortrait expression adapter: motion features to tokens, and keys and values for every block.

Source: arXiv 2507.12956, section 3, and fantasy-portrait, `model.py` and `diffsynth/pipelines/wan_video.py`.
Each video frame of each person gives 24 tokens: head pose, eyes, emotion and mouth, each projected, then the
tokens into which two resamplers split mouth and emotion (the paper's expression-augmented encoder). Unlike
the paper's equation 2, the released weights keep the projected emotion and mouth beside these. The values are
zero-initialised, as the audio adapter's are, so that a new adapter is a no-op.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Range, Settings, Width
from fantasy_jax.models.adapters.base import Adapter
from fantasy_jax.models.condition import Condition, KVProjection, zero_init_kv_layers
from fantasy_jax.models.layers import LayerNorm
from fantasy_jax.models.perceiver import Resampler, ResamplerConfig
from fantasy_jax.models.windows import split_windows, window_ranges
from fantasy_jax.typing import Array, DType, Float
from fantasy_jax.video import VideoConfig

_PARTS = ("head", "eye", "emotion", "mouth")
"""Parts of the motion features, in order; each is also a token."""
_SPLIT = ("mouth", "emotion", "head", "eye")
"""The parts in the order of the tokens into which they are split."""
_Queries = Annotated[int, Range(0, 2**20)]


@dataclass(frozen=True)
class ExpressionAdapterConfig(Settings):
    """Sizes of the adapter; the defaults are the released ones.

    Attributes:
        head_width: Features of the head's pose.
        eye_width: Features of gaze and lids.
        emotion_width: Features of the emotion.
        mouth_width: Features of the mouth.
        token_width: Width of the tokens.
        resampler: Sizes of the resamplers.
        mouth_queries: Tokens into which the mouth's features are split (expression-augmented learning, the
            paper's section 3); 0: they are not.
        emotion_queries: The same of the emotion's features.
        head_queries: The same of the head's pose, which the paper only splits in its ablation (table 3).
        eye_queries: The same of gaze and lids.
        masked: Whether video tokens that show a person attend to that person's tokens only (masked
            cross-attention, equation 4); otherwise all attend to everybody's.
        mask_padding: Whether the padding of the first latent frame's window is masked. The released weights
            are trained with padding that is attended to.
        width: Width D of the transformer.
        num_heads: Attention heads of the transformer.
        num_layers: Blocks of the transformer; 0 for the tokens alone.
    """

    head_width: Width = 6
    eye_width: Width = 6
    emotion_width: Width = 30
    mouth_width: Width = 512
    token_width: Width = 2048
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    mouth_queries: _Queries = 16
    emotion_queries: _Queries = 4
    head_queries: _Queries = 0
    eye_queries: _Queries = 0
    masked: bool = True
    mask_padding: bool = False
    width: Annotated[int, Range(0, 2**20)] = 5120
    num_heads: Annotated[int, Range(0, 2**20)] = 40
    num_layers: Annotated[int, Range(0, 1024)] = 40

    @property
    def part_widths(self) -> tuple[int, ...]:
        """Widths of head, eye, emotion and mouth."""
        return tuple(getattr(self, f"{part}_width") for part in _PARTS)

    @property
    def feature_width(self) -> int:
        """Motion features M of a frame."""
        return sum(self.part_widths)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a video frame."""
        return len(_PARTS) + sum(getattr(self, f"{part}_queries") for part in _SPLIT)


class ExpressionAdapter(Adapter):
    """Turns the motion features of each person into tokens that the transformer's blocks attend to."""

    input = "expression"
    dropout_group = "expression"
    per_person = "always"
    kv_projection: ClassVar[type[KVProjection]] = KVProjection

    @classmethod
    def input_shape(cls, config: ExpressionAdapterConfig, video: VideoConfig) -> tuple[int, ...]:
        """Shape `[T, M]` of one person's motion features."""
        return video.num_frames, config.feature_width

    def __init__(
        self,
        config: ExpressionAdapterConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the adapter; the values of all blocks are zero-initialised."""
        self.config = config
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.token_width
        self.projections = nnx.Dict(
            {
                part: nnx.Linear(count, width, use_bias=False, **types)
                for part, count in zip(_PARTS, config.part_widths, strict=True)
            }
        )
        self.norm = LayerNorm(width, epsilon=1e-5, param_dtype=param_dtype, rngs=rngs)

        def resampler(part: str) -> Resampler | None:
            features, queries = (getattr(config, f"{part}_{name}") for name in ("width", "queries"))
            return Resampler(config.resampler, features, queries, width, **types) if queries else None

        self.mouth, self.emotion = resampler("mouth"), resampler("emotion")
        self.head, self.eye = resampler("head"), resampler("eye")
        sizes = (width, config.width, config.num_heads, config.num_layers)
        self.layers = (
            zero_init_kv_layers(*sizes, projection=self.kv_projection, **types) if config.num_layers else None
        )

    @property
    def masked(self) -> bool:
        """Whether a person attends to their own expression only."""
        return self.config.masked

    def raw_tokens(self, features: Float[Array, "*n M"]) -> Float[Array, "*n 4 D"]:
        """Tokens of head, eyes, emotion and mouth, float32, all normalised by one norm."""
        parts = self._parts(features)
        tokens = [self.projections[name](part) for name, part in parts.items()]
        return self.norm(jnp.stack(tokens, axis=-2))

    def mouth_tokens(self, features: Float[Array, "*n M"]) -> Float[Array, "*n L D"]:
        """Tokens into which the mouth's features are split, float32."""
        return self._split_tokens("mouth", features)

    def emotion_tokens(self, features: Float[Array, "*n M"]) -> Float[Array, "*n L D"]:
        """Tokens into which the emotion's features are split, float32."""
        return self._split_tokens("emotion", features)

    def tokens(self, features: Float[Array, "*n T M"]) -> Float[Array, "*n A D"]:
        """The tokens of all video frames, one frame after another, float32."""
        split = [self._split_tokens(part, features) for part in _SPLIT if getattr(self, part) is not None]
        tokens = jnp.concatenate([self.raw_tokens(features), *split], axis=-2)
        return tokens.reshape(*features.shape[:-2], -1, tokens.shape[-1])

    def condition(
        self,
        features: Float[Array, "B P T M"],
        num_frames: int,
        *,
        scale: float | Float[Array, " B"] = 1.0,
    ) -> Condition:
        """A window of each person's tokens for each latent frame.

        Args:
            features: Motion features of P people, of every video frame.
            num_frames: Video frames T = 4k + 1.
            scale: Multiplier of the attended values.
        """
        batch, people = features.shape[:2]
        tokens = self.tokens(features.reshape(-1, *features.shape[2:]))
        windows, lengths = split_windows(tokens, window_ranges(tokens.shape[1], num_frames))
        windows = windows.reshape(batch, people, *windows.shape[1:])
        masked = jnp.broadcast_to(lengths, (batch, *lengths.shape)) if self.config.mask_padding else None
        return Condition(windows, masked, scale)

    def _parts(self, features: Array) -> dict[str, Array]:
        ends = [sum(self.config.part_widths[: i + 1]) for i in range(len(_PARTS) - 1)]
        return dict(zip(_PARTS, jnp.split(features, ends, axis=-1), strict=True))

    def _split_tokens(self, part: str, features: Float[Array, "*n M"]) -> Float[Array, "*n L D"]:
        """Resamples each frame's features of a part as a sequence of length one."""
        features = self._parts(features)[part]
        tokens = getattr(self, part)(features.reshape(-1, 1, features.shape[-1]))
        return tokens.reshape(*features.shape[:-1], *tokens.shape[1:])
