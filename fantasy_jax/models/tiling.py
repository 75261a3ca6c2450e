"""The VAE tile by tile: memory that does not grow with the picture, seams blended away.

Source: fantasy-talking, `diffsynth/models/wan_video_vae.py`, `tiled_encode` and `tiled_decode`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fantasy_jax.models.vae import WanVAE
from fantasy_jax.typing import Array, Float

PIXELS_PER_LATENT = 8

decode = jax.jit(lambda vae, latents: vae.decode(latents))
"""The whole picture at once, or a tile of it."""


def tiled_decode(
    vae: WanVAE,
    latents: Float[Array, "B F h w C"],
    *,
    tile: tuple[int, int] = (30, 52),
    stride: tuple[int, int] = (15, 26),
    progress: bool = False,
) -> Float[Array, "B T H W 3"]:
    """Decodes in tiles; the blended video is clamped to [-1, 1].

    Args:
        vae: The VAE.
        latents: Normalised latents.
        tile: Rows and columns of latents in a tile.
        stride: Rows and columns from one tile to the next, at most `tile`.
        progress: Show a bar.
    """
    video = blend_tiles(
        lambda x: decode(vae, x),
        latents,
        tile=tile,
        stride=stride,
        grow=PIXELS_PER_LATENT,
        progress="Decoding" if progress else None,
    )
    return jnp.clip(video, -1, 1)


def tiled_encode(
    vae: WanVAE,
    video: Float[Array, "B T H W 3"],
    *,
    tile: tuple[int, int] = (34, 34),
    stride: tuple[int, int] = (18, 16),
    progress: bool = False,
) -> Float[Array, "B F h w C"]:
    """Encodes in tiles; `tile` and `stride` are in latents, as for `tiled_decode`."""
    encode = jax.jit(lambda vae, x: vae.encode(x))
    rows, columns = ([size * PIXELS_PER_LATENT for size in pair] for pair in (tile, stride))
    return blend_tiles(
        lambda x: encode(vae, x),
        video,
        tile=tuple(rows),
        stride=tuple(columns),
        grow=1 / PIXELS_PER_LATENT,
        progress="Encoding" if progress else None,
    )


def blend_tiles(
    run: Callable[[Array], Array],
    array: Float[Array, "B t y x C"],
    *,
    tile: tuple[int, int],
    stride: tuple[int, int],
    grow: int | float,
    progress: str | None = None,
) -> Float[Array, "B u v w D"]:
    """Runs on overlapping tiles and averages what overlaps, by weights that fall linearly to a tile's edge.

    Args:
        run: Turns a tile into its result, sides `grow` times as long.
        array: What to cut up.
        tile: Rows and columns of a tile; those at the far edges may be smaller.
        stride: Rows and columns from one tile to the next.
        grow: Sides of the result over sides of the array.
        progress: Name of the bar, None for none.
    """
    sides = array.shape[2:4]
    starts = [_starts(*each) for each in zip(sides, tile, stride, strict=True)]
    places = [(row, column) for row in starts[0] for column in starts[1]]
    out_sides = [int(side * grow) for side in sides]
    values = weights = None
    for place in tqdm(places, desc=progress, unit="tile", disable=progress is None or len(places) == 1):
        ends = [start + size for start, size in zip(place, tile, strict=True)]
        result = run(array[:, :, place[0] : ends[0], place[1] : ends[1]])
        ramps = [
            _ramp(length, int((size - step) * grow), rises=start > 0, falls=end < side)
            for length, size, step, start, end, side in zip(
                result.shape[2:4], tile, stride, place, ends, sides, strict=True
            )
        ]
        weight = np.minimum(ramps[0][:, None], ramps[1][None, :])[..., None]
        if values is None:
            values = np.zeros((*result.shape[:2], *out_sides, result.shape[-1]), np.float32)
            weights = np.zeros((*out_sides, 1), np.float32)
        where = tuple(
            slice(int(start * grow), int(start * grow) + length)
            for start, length in zip(place, result.shape[2:4], strict=True)
        )
        # Sums are kept on the host: a tile is all that the device ever holds.
        values[:, :, *where] += np.asarray(result, np.float32) * weight
        weights[where] += weight
    return jnp.asarray(values / weights)


def _starts(side: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin; one that would lie wholly within the tile before it is left out."""
    return [start for start in range(0, side, stride) if start == 0 or start - stride + tile < side]


def _ramp(length: int, border: int, *, rises: bool, falls: bool) -> Float[np.ndarray, " length"]:
    """Weights along one side of a tile, 1 but for the borders where another tile overlaps."""
    weights = np.ones(length, np.float32)
    if border == 0:
        return weights
    slope = (np.arange(border, dtype=np.float32) + 1) / np.float32(border)
    if rises:
        weights[:border] = slope
    if falls:
        weights[-border:] = slope[::-1]
    return weights
