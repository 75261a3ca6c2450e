"""The VAE on streams: chunks of latent frames, in memory that does not grow with the length."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.models.halo import num_row_shards
from fantasy_jax.models.tiling import Tile, average_tiles, split_tiles, total_weights
from fantasy_jax.models.tiny_decoder import TinyDecoder
from fantasy_jax.models.vae import Carried, WanVAE
from fantasy_jax.preprocessing.images import from_uint8, to_uint8
from fantasy_jax.system.vae_memory import free_bytes, largest_divisor, most_at_once
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import TEMPORAL_FACTOR, by_latent_frame

Decoder = WanVAE | TinyDecoder
"""Networks that decode one latent frame after another."""


@partial(jax.jit, donate_argnames="carried")
def decode_step(
    vae: Decoder,
    carried: Carried | None,
    latents: Float[Array, "B F h w C"],
    weights: Float[Array | np.ndarray, "H W 1"] | None = None,
) -> tuple[Carried, Float[Array, "B T H W 3"]]:
    """Decodes latent frames, or one tile of them, as `WanVAE.decode_chunk` does.

    Args:
        vae: The VAE, or a decoder in its place.
        carried: What the call before returned; None for the first latent frame.
        latents: Normalised.
        weights: Factors of the pixels; None leaves them as they are.

    Returns:
        What the next call takes, and pixels, float32.
    """
    pixels, carried = vae.decode_chunk(latents, carried)
    pixels = pixels.astype(jnp.float32)
    return carried, pixels if weights is None else pixels * weights


_to_bytes = jax.jit(to_uint8)


Tiling = Literal["auto", "on", "off"]
"""Whether one device decodes in tiles: where the whole image does not fit its memory, always, or never."""


@dataclass(frozen=True)
class DecodingPlan:
    """How much is decoded at once.

    Attributes:
        tiles: Tiles of the image; a single one is the whole image.
        most: Latent frames of a call at most.
    """

    tiles: tuple[Tile, ...]
    most: int

    @property
    def in_tiles(self) -> bool:
        """Whether there are several tiles."""
        return len(self.tiles) > 1


def plan_decoding(
    vae: Decoder,
    latents: jax.ShapeDtypeStruct,
    free: int | float,
    *,
    tiling: Tiling = "auto",
    tile: Sequence[int] = (30, 52),
    stride: Sequence[int] = (15, 26),
) -> DecodingPlan:
    """Chooses what is decoded at once by the memory that it takes: caches, which are exact, and temporaries.

    Args:
        vae: The VAE, or a tiny decoder, which needs little memory and no tiles.
        latents: One latent frame, `[B, 1, h, w, C]`.
        free: Bytes that no array takes (`free_bytes`).
        tiling: Whether one device decodes in tiles. Devices that share the rows never do.
        tile: Rows and columns of a tile, in latents.
        stride: Rows and columns between tiles, in latents; at most `tile`.
    """
    size, scale = latents.shape[2:4], vae.config.spatial_factor
    whole, tiles = (split_tiles(size, *sides, scale) for sides in ((size, size), (tile, stride)))
    if isinstance(vae, TinyDecoder):
        return DecodingPlan(whole, 1)
    is_whole = num_row_shards() > 1 or len(tiles) == 1 or tiling == "off"
    most = 0
    if is_whole or tiling == "auto":
        most = most_at_once(vae, size, free, 0 if math.isinf(free) else _cache_bytes(vae, latents))
    return DecodingPlan(whole, max(most, 1)) if most or is_whole else DecodingPlan(tiles, 1)


def _cache_bytes(vae: WanVAE, latents: jax.ShapeDtypeStruct) -> int:
    """Bytes of the causal caches of a device."""
    carried, _ = decode_step.eval_shape(vae, None, latents)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in carried) // num_row_shards()


class StreamingDecoder:
    """Decodes latents chunk by chunk; the latents of a call follow those of the calls before.

    The causal caches, one for each tile, stay on the devices between calls.
    """

    def __init__(
        self,
        vae: Decoder,
        *,
        tiling: Tiling = "auto",
        tile: Sequence[int] = (30, 52),
        stride: Sequence[int] = (15, 26),
    ):
        """Starts a stream.

        Args:
            vae: The VAE, or a decoder in its place.
            tiling: As of `plan_decoding`, like the others.
            tile: Rows and columns of a tile, in latents.
            stride: Rows and columns between tiles, in latents; at most `tile`.
        """
        self._vae, self._settings = vae, {"tiling": tiling, "tile": tile, "stride": stride}
        self._plan: DecodingPlan | None = None
        self._carried: dict[int, Carried] = {}

    def plan(self, latents: Float[Array, "B F h w C"]) -> DecodingPlan:
        """How the stream is decoded, which the first call decides."""
        if self._plan is None:
            batch, _, *frame = latents.shape
            one = jax.ShapeDtypeStruct((batch, 1, *frame), latents.dtype)
            self._plan = plan_decoding(self._vae, one, free_bytes(), **self._settings)
        return self._plan

    def chunks(self, latents: Float[Array, "B F h w C"]) -> list[slice]:
        """Splits the next latents: the stream's first latent frame, then as many as are decoded at once."""
        first, count = 0 if self._carried else 1, latents.shape[1]
        step = largest_divisor(count - first, self.plan(latents).most)
        return [slice(0, first)] * first + [slice(i, i + step) for i in range(first, count, step)]

    def __call__(self, latents: Float[Array, "1 F h w C"]) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
        """Yields the frames of each chunk: one for the stream's first latent frame, then four for each.

        They are those of all latents decoded at once. Pixels become bytes on the device.

        Args:
            latents: Normalised latents; the height and width are the same in every call.
        """
        for chunk in self.chunks(latents):
            yield np.asarray(_to_bytes(self.decode(latents[:, chunk])))[0]

    def decode(self, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
        """Pixels of the next chunk, float32, not clamped to [-1, 1]."""
        plan = self.plan(latents)
        if not plan.in_tiles:
            return self._decode_tile(0, latents)
        parts = [self._decode_tile(i, latents[:, :, *x.read], x.weights) for i, x in enumerate(plan.tiles)]
        return average_tiles(parts, plan.tiles, total_weights(plan.tiles))

    def _decode_tile(
        self,
        index: int,
        latents: Float[Array, "B F y x C"],
        weights: Float[np.ndarray, "H W 1"] | None = None,
    ) -> Float[Array, "B T H W 3"]:
        carried = self._carried.pop(index, None)  # its memory is reused
        self._carried[index], pixels = decode_step(self._vae, carried, latents, weights)
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
