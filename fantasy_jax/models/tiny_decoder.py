"""TAEW2.1's decoder: video of Wan2.1's latents with a twenty-fifth of the VAE's operations, for previews.

Source: madebyollin/taehv, `taehv.py` (`TAEHV`). Frames are convolved one by one; blocks also see the frame
before each. The frames of a video can be decoded in chunks, as by the VAE (`models/vae.py`), and on a mesh
the rows are sharded likewise.
"""

from dataclasses import dataclass
from itertools import pairwise

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Depth, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.halo import Rows, halo_exchange
from fantasy_jax.models.vae import PAD_COLUMNS, Carried, CausalConvCache, Conv, Linear
from fantasy_jax.typing import Array, DType, Float


@dataclass(frozen=True)
class TinyDecoderConfig(Settings):
    """Sizes of the decoder; the defaults are TAEW2.1's.

    Attributes:
        latent_channels: Latent channels C.
        widths: Width of each stage, and of what the last one gives.
        num_blocks: Blocks per stage.
        temporal_upsample: Whether each stage also doubles time.
    """

    latent_channels: Width = 16
    widths: tuple[Width, ...] = (256, 128, 64, 64)
    num_blocks: Depth = 3
    temporal_upsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self):
        super().__post_init__()
        if len(self.widths) != len(self.temporal_upsample) + 1:
            raise ConfigError(
                f"widths has {len(self.widths)} values; it must have one more than temporal_upsample, which "
                f"has {len(self.temporal_upsample)}"
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** len(self.temporal_upsample)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first."""
        return 2 ** sum(self.temporal_upsample)


class FrameConv(nnx.Module):
    """Convolution of three rows and columns in each frame."""

    def __init__(self, inputs: int, outputs: int, **types):
        self.conv = Conv(inputs, outputs, (1, 3, 3), padding=PAD_COLUMNS, **types)

    def __call__(self, x: Float[Array, "B T H W C"], rows: Rows) -> Float[Array, "B T H W D"]:
        """Runs on one device's rows."""
        return self.conv(rows.extend(x, above=1, below=1))


class MemoryBlock(nnx.Module):
    """Three convolutions of each frame and the one before it, with a residual connection."""

    def __init__(self, dim: int, **types):
        self.convs = nnx.List(FrameConv(inputs, dim, **types) for inputs in (2 * dim, dim, dim))

    def __call__(self, x: Float[Array, "B T H W C"], cache: CausalConvCache) -> Float[Array, "B T H W C"]:
        """Runs on a chunk; the first frame of a video has zeros before it."""
        y = jnp.concatenate([x, cache.extend(x, 1)[:, :-1]], axis=-1)
        for conv in self.convs[:-1]:
            y = nnx.relu(conv(y, cache.rows))
        return nnx.relu(self.convs[-1](y, cache.rows) + x)


class Stage(nnx.Module):
    """Memory blocks, doubling of space and, with `temporal`, of time, and a convolution."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int, *, temporal: bool, **types):
        self.blocks = nnx.List(MemoryBlock(inputs, **types) for _ in range(num_blocks))
        self.frames = 2 if temporal else 1
        self.grow = Linear(inputs, self.frames * inputs, use_bias=False, **types)
        self.conv = FrameConv(inputs, outputs, use_bias=False, **types)

    def __call__(self, x: Float[Array, "B T H W C"], cache: CausalConvCache) -> Float[Array, "B U 2*H 2*W D"]:
        """Runs on a chunk."""
        for block in self.blocks:
            x = block(x, cache)
        batch, length, height, width, channels = x.shape
        # TAEHV doubles space first. The order does not matter to a map of single pixels.
        x = self.grow(x).reshape(batch, length, height, width, self.frames, channels)
        x = x.transpose(0, 1, 4, 2, 3, 5).reshape(batch, length * self.frames, height, width, channels)
        return self.conv(x.repeat(2, axis=2).repeat(2, axis=3), cache.rows)


class TinyDecoder(nnx.Module):
    """Decodes normalised latents."""

    def __init__(
        self,
        config: TinyDecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the network."""
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.conv_in = FrameConv(config.latent_channels, config.widths[0], **types)
        self.stages = nnx.List(
            Stage(inputs, outputs, config.num_blocks, temporal=temporal, **types)
            for (inputs, outputs), temporal in zip(
                pairwise(config.widths), config.temporal_upsample, strict=True
            )
        )
        self.conv_out = FrameConv(config.widths[-1], 3, **types)

    def decode_chunk(
        self, latents: Float[Array, "B F h w C"], carried: Carried | None
    ) -> tuple[Float[Array, "B T H W 3"], Carried]:
        """Frames of latents in [-1, 1]: one of a video's first latent frame, four of each after it.

        Args:
            latents: Normalised, as the transformer has them; any number of latent frames.
            carried: What the call before returned; None for the first latent frames.
        """
        graphdef, state = nnx.split(self)
        return halo_exchange(
            lambda state, *arguments: nnx.merge(graphdef, state)._decode_chunk(*arguments),
            state,
            latents,
            carried,
        )

    def _decode_chunk(
        self, latents: Float[Array, "B F h w C"], carried: Carried | None, rows: Rows
    ) -> tuple[Float[Array, "B T H W 3"], Carried]:
        """Frames of one device's rows."""
        cache = CausalConvCache(carried, rows)
        x = nnx.relu(self.conv_in(3 * jnp.tanh(latents / 3), rows))
        for stage in self.stages:
            x = stage(x, cache)
        pixels = jnp.clip(self.conv_out(nnx.relu(x), rows), 0, 1)
        # The first latent frame gives as many frames as any other, of which the last is the video's first.
        trimmed = self.config.temporal_factor - 1 if cache.first else 0
        return 2 * pixels[:, trimmed:] - 1, cache.carried
