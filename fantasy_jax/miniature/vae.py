"""The miniature's VAE: Wan2.1's at a small size, on patches of pixels, with a linear map beside it.

The linear map is initialised from principal components, which lets a small VAE learn in minutes. With patches
of pixels as channels, as in Wan2.2's VAE, there are no layers at full resolution.
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import NonNegativeInt, Width
from fantasy_jax.miniature.convolution import convolve
from fantasy_jax.models.halo import Rows
from fantasy_jax.models.vae import PAD_COLUMNS, Carried, Conv, Linear, VAEConfig, WanVAE
from fantasy_jax.typing import Array, DType, Float
from fantasy_jax.video import TEMPORAL_FACTOR


@dataclass(frozen=True)
class MiniatureVAEConfig(VAEConfig):
    """Sizes of the miniature's VAE.

    Attributes:
        patch: Rows and columns of pixels that become channels before the encoder.
        overlap: Neighbouring latents on each side that the linear map to a block of pixels reads. With 0
            blocks are independent, and their borders show.
        refiner: Width of the layers that refine decoded frames; 0 for none.
    """

    patch: Width = 2
    overlap: NonNegativeInt = 0
    refiner: NonNegativeInt = 0

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
        self.side, self.overlap = config.spatial_factor, config.overlap
        pixels, channels = 3 * self.side**2, config.latent_channels
        window = (2 * config.overlap + 1) ** 2 * channels
        self.encode_first = Linear(pixels, channels, **types)
        self.encode_chunk = Linear(TEMPORAL_FACTOR * pixels, channels, **types)
        self.decode_first = Linear(window, pixels, **types)
        self.decode_chunk = Linear(window, TEMPORAL_FACTOR * pixels, **types)

    def encode(self, chunk: Float[Array, "B T H W 3"], *, first: bool) -> Float[Array, "B F h w C"]:
        """Term of the posterior's mean of the first frame, or of 4F frames after it."""
        if first:
            return self.encode_first(to_blocks(chunk, 1, self.side))
        return self.encode_chunk(to_blocks(chunk, TEMPORAL_FACTOR, self.side))

    def decode(
        self, latents: Float[Array, "B F h w C"], rows: Rows, *, first: bool
    ) -> Float[Array, "B T H W 3"]:
        """Term of the decoded pixels of the first frame, or of 4F frames after it."""
        latents = windows(latents, self.overlap, rows)
        if first:
            return from_blocks(self.decode_first(latents), 1, self.side)
        return from_blocks(self.decode_chunk(latents), TEMPORAL_FACTOR, self.side)


class Refiner(nnx.Module):
    """Four convolutions of each decoded frame, on patches of pixels, with residual connections.

    It removes borders of blocks, and what errors of latents leave in the pixels.
    """

    def __init__(self, config: MiniatureVAEConfig, **types):
        self.patch = config.patch
        pixels, width = config.pixel_channels, config.refiner
        conv = partial(Conv, kernel_size=(1, 3, 3), padding=PAD_COLUMNS, **types)
        self.conv_in = conv(pixels, width)
        self.middle = nnx.List([conv(width, width) for _ in range(2)])
        self.conv_out = conv(width, pixels)

    def __call__(self, video: Float[Array, "B T H W 3"], rows: Rows) -> Float[Array, "B T H W 3"]:
        """Refines one device's rows."""
        x = self.conv_in(_padded(to_blocks(video, 1, self.patch), rows))
        for layer in self.middle:
            x += layer(_padded(nnx.silu(x), rows))
        return video + from_blocks(self.conv_out(_padded(nnx.silu(x), rows)), 1, self.patch)


def _padded(x: Float[Array, "B T H W C"], rows: Rows) -> Float[Array, "B T R W C"]:
    return rows.extend(x, above=1, below=1)


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
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.shortcut = LinearShortcut(config, **types)
        self.refiner = Refiner(config, **types) if config.refiner else None
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
        video += self.shortcut.decode(self._denormalise(latents), rows, first=carried is None)
        return video if self.refiner is None else self.refiner(video, rows), following


def windows(x: Float[Array, "B T H W C"], overlap: int, rows: Rows) -> Float[Array, "B T H W D"]:
    """Concatenates the channels of the `2 * overlap + 1` rows and columns around each position.

    A position outside the image has the channels of the one in the middle.

    Args:
        x: One device's rows.
        overlap: Neighbours on each side.
        rows: How rows are sharded.
    """
    if not overlap:
        return x
    sides = [(0, 0)] * 3 + [(overlap, overlap), (0, 0)]
    padded, inside = (
        jnp.pad(rows.extend(y, above=overlap, below=overlap), sides) for y in (x, jnp.ones_like(x[..., :1]))
    )
    height, width = x.shape[2:4]
    places = [np.s_[:, :, i : i + height, j : j + width] for i, j in np.ndindex(*[2 * overlap + 1] * 2)]
    return jnp.concatenate([jnp.where(inside[place] > 0, padded[place], x) for place in places], axis=-1)


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
