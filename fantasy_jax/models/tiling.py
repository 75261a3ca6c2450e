"""Overlapping tiles of an image, whose results are blended.

Source: fantasy-talking, `diffsynth/models/wan_video_vae.py`, `tiled_decode`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.typing import Array, Float


@dataclass(frozen=True)
class Span:
    """Rows or columns of a tile.

    Attributes:
        read: First and last (exclusive) in the input.
        written: The same in the result.
        border: Rows or columns of the result that another tile overlaps, at each end that has one.
        rises: Whether another tile overlaps the beginning.
        falls: Whether another tile overlaps the end.
    """

    read: tuple[int, int]
    written: tuple[int, int]
    border: int
    rises: bool
    falls: bool

    @property
    def weights(self) -> Float[np.ndarray, " length"]:
        """Weights in the result: 1, except that they fall linearly to the ends that another tile overlaps."""
        weights = np.ones(self.written[1] - self.written[0], np.float32)
        if self.border == 0:
            return weights
        slope = (np.arange(self.border, dtype=np.float32) + 1) / np.float32(self.border)
        if self.rises:
            weights[: self.border] = slope
        if self.falls:
            weights[-self.border :] = slope[::-1]
        return weights


@dataclass(frozen=True)
class Tile:
    """A part of an image: a span of rows and one of columns."""

    rows: Span
    columns: Span

    @property
    def read(self) -> tuple[slice, slice]:
        """Its rows and columns in the input."""
        return slice(*self.rows.read), slice(*self.columns.read)

    @property
    def written(self) -> tuple[slice, slice]:
        """Its rows and columns in the result."""
        return slice(*self.rows.written), slice(*self.columns.written)

    @property
    def weights(self) -> Float[np.ndarray, "H W 1"]:
        """Weights of its result."""
        return np.minimum(self.rows.weights[:, None], self.columns.weights[None, :])[..., None]


def split_tiles(
    sides: Sequence[int], tile: Sequence[int], stride: Sequence[int], scale: int | float
) -> tuple[Tile, ...]:
    """Splits an image into overlapping tiles.

    Args:
        sides: Height and width of the input.
        tile: Rows and columns of a tile; tiles at the bottom and right edges may be smaller.
        stride: Rows and columns between tiles, at most `tile`.
        scale: Ratio of the sides of result and input.
    """
    spans = [list(_spans(*each, scale)) for each in zip(sides, tile, stride, strict=True)]
    return tuple(Tile(rows, columns) for rows, columns in product(*spans))


def _spans(side: int, tile: int, stride: int, scale: int | float) -> Iterator[Span]:
    for start in range(0, side, stride):
        if start and start - stride + tile >= side:
            return  # it would lie entirely inside the previous one
        read = start, min(start + tile, side)
        written = int(read[0] * scale), int(read[1] * scale)
        border = int((tile - stride) * scale)
        yield Span(read, written, border, rises=start > 0, falls=start + tile < side)


def total_weights(tiles: Sequence[Tile]) -> Float[np.ndarray, "H W 1"]:
    """Sum of the weights of all tiles at each place of the result."""
    total = np.zeros((tiles[-1].rows.written[1], tiles[-1].columns.written[1], 1), np.float32)
    for tile in tiles:
        total[tile.written] += tile.weights
    return total


@partial(jax.jit, static_argnums=1)
def average_tiles(
    weighted: Sequence[Array], tiles: tuple[Tile, ...], total: Float[Array, "H W 1"]
) -> Float[Array, "B t H W D"]:
    """Blends results that have been multiplied by their tiles' weights.

    The products belong to another program than their sums, so that no compiler fuses them into multiply-adds,
    which round once instead of twice: the result has the same bits as NumPy's.

    Args:
        weighted: One for each tile, `[B, t, y, x, D]`.
        tiles: All tiles of the image.
        total: Their `total_weights`.
    """
    batch, frames, *_, channels = weighted[0].shape
    summed = jnp.zeros((batch, frames, *total.shape[:2], channels), jnp.float32)
    for tile, part in zip(tiles, weighted, strict=True):
        summed = summed.at[:, :, *tile.written].add(part)
    return summed / total


def blend_tiles(
    run: Callable[[Array], Array],
    array: Float[Array, "B t y x C"],
    *,
    tile: Sequence[int],
    stride: Sequence[int],
    scale: int | float,
) -> Float[Array, "B u v w D"]:
    """Runs a function on overlapping tiles and averages overlaps.

    Args:
        run: Maps a tile to its result, whose height and width are multiplied by `scale`.
        array: Input that is split into tiles.
        tile: As of `split_tiles`, like `stride` and `scale`.
        stride: Rows and columns between tiles.
        scale: Ratio of the sides of result and input.
    """
    tiles = split_tiles(array.shape[2:4], tile, stride, scale)
    weighted = [run(array[:, :, *each.read]).astype(jnp.float32) * each.weights for each in tiles]
    return average_tiles(weighted, tiles, total_weights(tiles))
