"""The VAE on streams: one latent frame after another, in memory that does not grow with the length."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.models.halo import num_row_shards
from fantasy_jax.models.tiling import average_tiles, split_tiles, total_weights
from fantasy_jax.models.tiny_decoder import TinyDecoder
from fantasy_jax.models.vae import Carried, WanVAE
from fantasy_jax.preprocessing.images import from_uint8, to_uint8
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import TEMPORAL_FACTOR, by_latent_frame

Decoder = WanVAE | TinyDecoder
"""Networks that decode one latent frame after another."""


@partial(jax.jit, donate_argnames="carried")
def decode_step(
    vae: Decoder,
    carried: Carried | None,
    latent: Float[Array, "B 1 h w C"],
    weights: Float[Array | np.ndarray, "H W 1"] | None = None,
) -> tuple[Carried, Float[Array, "B T H W 3"]]:
    """Decodes one latent frame, or one tile of it, as `WanVAE.decode_chunk` does.

    Args:
        vae: The VAE, or a decoder in its place.
        carried: What the call before returned; None for the first latent frame.
        latent: Normalised.
        weights: Factors of the pixels; None leaves them as they are.

    Returns:
        What the next call takes, and pixels, float32.
    """
    pixels, carried = vae.decode_chunk(latent, carried)
    pixels = pixels.astype(jnp.float32)
    return carried, pixels if weights is None else pixels * weights


_to_bytes = jax.jit(to_uint8)


class StreamingDecoder:
    """Decodes latents frame by frame; the latents of a call follow those of the calls before.

    One device decodes in tiles, which are blended. Devices that share the rows of a clip, on the mesh in
    force, decode without tiles. The causal caches, one for each tile, stay on the devices between calls.
    """

    def __init__(self, vae: Decoder, *, tile: Sequence[int] = (30, 52), stride: Sequence[int] = (15, 26)):
        """Starts a stream.

        Args:
            vae: The VAE, or a decoder in its place.
            tile: Rows and columns of a tile, in latents.
            stride: Rows and columns between tiles, in latents; at most `tile`.
        """
        self._vae, self._tile, self._stride = vae, tile, stride
        self._carried: dict[int, Carried] = {}

    def __call__(self, latents: Float[Array, "1 F h w C"]) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
        """Yields the frames of each latent frame: one for the stream's first latent frame, then four each.

        They are those of all latents decoded at once. Pixels become bytes on the device.

        Args:
            latents: Normalised latents; the height and width are the same in every call.
        """
        for index in range(latents.shape[1]):
            yield np.asarray(_to_bytes(self.decode(latents[:, index : index + 1])))[0]

    def decode(self, latent: Float[Array, "B 1 h w C"]) -> Float[Array, "B T H W 3"]:
        """Pixels of the next latent frame, float32, not clamped to [-1, 1]."""
        tiles = split_tiles(latent.shape[2:4], self._tile, self._stride, self._vae.config.spatial_factor)
        if num_row_shards() > 1 or len(tiles) == 1:
            return self._decode_tile(0, latent)
        parts = [self._decode_tile(i, latent[:, :, *x.read], x.weights) for i, x in enumerate(tiles)]
        return average_tiles(parts, tiles, total_weights(tiles))

    def _decode_tile(
        self, index: int, latent: Float[Array, "B 1 y x C"], weights: Float[np.ndarray, "H W 1"] | None = None
    ) -> Float[Array, "B T H W 3"]:
        carried = self._carried.pop(index, None)  # its memory is reused
        self._carried[index], pixels = decode_step(self._vae, carried, latent, weights)
        return pixels


@partial(jax.jit, donate_argnames="carried")
def encode_step(
    vae: WanVAE, carried: Carried | None, frames: UInt8[Array, "B T H W 3"]
) -> tuple[Carried, Float[Array, "B 1 h w C"]]:
    """Encodes the first frame, or four frames after it, as `WanVAE.encode_chunk` does."""
    latent, carried = vae.encode_chunk(from_uint8(frames), carried)
    return carried, latent


def encode_stream(
    vae: WanVAE, frames: Iterable[UInt8[np.ndarray, "H W 3"]]
) -> Iterator[Float[Array, "1 1 h w C"]]:
    """Yields the normalised latents of a video, one latent frame after another.

    They are those of `vae.encode` of all frames at once; on a mesh, rows are sharded likewise.

    Args:
        vae: The VAE.
        frames: 4k + 1 frames of one size, read when they are needed; sides as of `WanVAE.encode`.

    Raises:
        ValueError: The number of frames or a side is another. The latents before are yielded first.
    """
    carried, count = None, 0
    for chunk in by_latent_frame(frames):
        count += len(chunk)
        if count % TEMPORAL_FACTOR != 1:
            break
        carried, latent = encode_step(vae, carried, np.stack(chunk)[None])
        yield latent
    if count % TEMPORAL_FACTOR != 1:
        raise ValueError(f"video of {count} frames: their number must be 4k + 1")
