"""Tiled decoding: memory does not grow with the size of the image, and tiles are blended.

Source: fantasy-talking, `diffsynth/models/wan_video_vae.py`, `tiled_decode`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fantasy_jax.models.vae import WanVAE
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import PIXELS_PER_LATENT

decode = jax.jit(lambda vae, latents: vae.decode(latents))
"""Decodes whole frames or one tile of them."""


def tiled_decode(
    vae: WanVAE,
    latents: Float[Array, "B F h w C"],
    *,
    tile: tuple[int, int] = (30, 52),
    stride: tuple[int, int] = (15, 26),
    progress: bool = False,
) -> Float[Array, "B T H W 3"]:
    """Decodes in tiles; the result is clamped to [-1, 1].

    Args:
        vae: The VAE.
        latents: Normalised latents.
        tile: Rows and columns of a tile, in latents.
        stride: Rows and columns between tiles, in latents; at most `tile`.
        progress: Whether to show a progress bar.
    """
    video = blend_tiles(
        lambda x: decode(vae, x),
        latents,
        tile=tile,
        stride=stride,
        scale=PIXELS_PER_LATENT,
        progress="Decoding" if progress else None,
    )
    return jnp.clip(video, -1, 1)


def blend_tiles(
    run: Callable[[Array], Array],
    array: Float[Array, "B t y x C"],
    *,
    tile: tuple[int, int],
    stride: tuple[int, int],
    scale: int | float,
    progress: str | None = None,
) -> Float[Array, "B u v w D"]:
    """Runs a function on overlapping tiles and averages overlaps; weights fall linearly to a tile's edges.

    Args:
        run: Maps a tile to its result, whose height and width are multiplied by `scale`.
        array: Input that is split into tiles.
        tile: Rows and columns of a tile; tiles at the bottom and right edges may be smaller.
        stride: Rows and columns between tiles.
        scale: Ratio of the sides of result and input.
        progress: Description of the progress bar, None for no bar.
    """
    sides = array.shape[2:4]
    starts = [_starts(*each) for each in zip(sides, tile, stride, strict=True)]
    places = [(row, column) for row in starts[0] for column in starts[1]]
    out_sides = [int(side * scale) for side in sides]
    values = weights = None
    for place in tqdm(places, desc=progress, unit="tile", disable=progress is None or len(places) == 1):
        ends = [start + size for start, size in zip(place, tile, strict=True)]
        result = run(array[:, :, place[0] : ends[0], place[1] : ends[1]])
        ramps = [
            _ramp(length, int((size - step) * scale), rises=start > 0, falls=end < side)
            for length, size, step, start, end, side in zip(
                result.shape[2:4], tile, stride, place, ends, sides, strict=True
            )
        ]
        weight = np.minimum(ramps[0][:, None], ramps[1][None, :])[..., None]
        if values is None:
            values = np.zeros((*result.shape[:2], *out_sides, result.shape[-1]), np.float32)
            weights = np.zeros((*out_sides, 1), np.float32)
        where = tuple(
            slice(int(start * scale), int(start * scale) + length)
            for start, length in zip(place, result.shape[2:4], strict=True)
        )
        # Sums are in host memory: the device holds a single tile.
        values[:, :, *where] += np.asarray(result, np.float32) * weight
        weights[where] += weight
    return jnp.asarray(values / weights)


def _starts(side: int, tile: int, stride: int) -> list[int]:
    """First rows or columns of the tiles; a tile that lies entirely inside the previous one is left out."""
    return [start for start in range(0, side, stride) if start == 0 or start - stride + tile < side]


def _ramp(length: int, border: int, *, rises: bool, falls: bool) -> Float[np.ndarray, " length"]:
    """Weights along one side of a tile: 1, except at the borders where another tile overlaps."""
    weights = np.ones(length, np.float32)
    if border == 0:
        return weights
    slope = (np.arange(border, dtype=np.float32) + 1) / np.float32(border)
    if rises:
        weights[:border] = slope
    if falls:
        weights[-border:] = slope[::-1]
    return weights
