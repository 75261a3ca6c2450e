"""The miniature's VAE: Wan2.1's at a small size, on patches of pixels, with a linear map beside it.

The linear map is initialised from principal components, which lets a small VAE learn in minutes. With patches
of pixels as channels, as in Wan2.2's VAE, there are no layers at full resolution.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Width
from fantasy_jax.miniature.convolution import convolve
from fantasy_jax.models.halo import Rows
from fantasy_jax.models.vae import Carried, Linear, VAEConfig, WanVAE
from fantasy_jax.typing import Array, DType, Float
from fantasy_jax.video import TEMPORAL_FACTOR


@dataclass(frozen=True)
class MiniatureVAEConfig(VAEConfig):
    """Sizes of the miniature's VAE.

    Attributes:
        patch: Rows and columns of pixels that become channels before the encoder.
    """

    patch: Width = 2

    @property
    def pixel_channels(self) -> int:
        """Input channels of the encoder and output channels of the decoder."""
        return 3 * self.patch**2

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side."""
        return self.patch * super().spatial_factor


class LinearShortcut(nnx.Module):
    """Linear maps between pixels and latents: one of the first frame, one of every four frames after it."""

    def __init__(self, config: MiniatureVAEConfig, **types):
        self.side = config.spatial_factor
        pixels = 3 * self.side**2
        self.encode_first = Linear(pixels, config.latent_channels, **types)
        self.encode_chunk = Linear(TEMPORAL_FACTOR * pixels, config.latent_channels, **types)
        self.decode_first = Linear(config.latent_channels, pixels, **types)
        self.decode_chunk = Linear(config.latent_channels, TEMPORAL_FACTOR * pixels, **types)

    def encode(self, chunk: Float[Array, "B T H W 3"], *, first: bool) -> Float[Array, "B F h w C"]:
        """Term of the posterior's mean of the first frame, or of 4F frames after it."""
        if first:
            return self.encode_first(to_blocks(chunk, 1, self.side))
        return self.encode_chunk(to_blocks(chunk, TEMPORAL_FACTOR, self.side))

    def decode(self, latents: Float[Array, "B F h w C"], *, first: bool) -> Float[Array, "B T H W 3"]:
        """Term of the decoded pixels of the first frame, or of 4F frames after it."""
        if first:
            return from_blocks(self.decode_first(latents), 1, self.side)
        return from_blocks(self.decode_chunk(latents), TEMPORAL_FACTOR, self.side)


class MiniatureVAE(WanVAE):
    """The miniature's VAE; used like `WanVAE`."""

    config: MiniatureVAEConfig

    def __init__(
        self,
        config: MiniatureVAEConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds encoder, decoder and linear maps."""
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.shortcut = LinearShortcut(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        for _, module in nnx.iter_graph(self):
            if isinstance(module, nnx.Conv):
                module.conv_general_dilated = convolve

    def _encode_chunk(
        self, chunk: Float[Array, "B T H W 3"], carried: Carried | None, rows: Rows
    ) -> tuple[Float[Array, "B F h w D"], Carried]:
        moments, following = super()._encode_chunk(to_blocks(chunk, 1, self.config.patch), carried, rows)
        linear = self.shortcut.encode(chunk, first=carried is None)
        return moments.at[..., : self.config.latent_channels].add(linear), following

    def _decode_chunk(
        self, latents: Float[Array, "B F h w C"], carried: Carried | None, rows: Rows
    ) -> tuple[Float[Array, "B T H W 3"], Carried]:
        blocks, following = super()._decode_chunk(latents, carried, rows)
        video = from_blocks(blocks, 1, self.config.patch)
        return video + self.shortcut.decode(self._denormalise(latents), first=carried is None), following


def to_blocks(video: Float[Array, "B T H W C"], frames: int, side: int) -> Float[Array, "B U h w D"]:
    """Moves blocks of `frames` frames, `side` rows and `side` columns into the channels."""
    batch, length, height, width, _ = video.shape
    blocks = (batch, length // frames, frames, height // side, side, width // side, side, -1)
    blocked = video.reshape(blocks).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return blocked.reshape(*blocked.shape[:4], -1)


def from_blocks(blocks: Float[Array, "B U h w D"], frames: int, side: int) -> Float[Array, "B T H W C"]:
    """Inverse of `to_blocks`."""
    batch, count, height, width, _ = blocks.shape
    video = blocks.reshape(batch, count, height, width, frames, side, side, -1)
    video = video.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return video.reshape(batch, count * frames, height * side, width * side, -1)
