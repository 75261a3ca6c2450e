"""An image on which shapes with soft edges are painted, as part of a compiled program."""

import jax.numpy as jnp

from fantasy_jax.typing import Array


class Canvas:
    """An image onto which shapes are painted one over the other.

    Attributes:
        color: The image, `[H, W, 3]`.
        clear: Part of the original image that is still visible, `[H, W]`.
        pixel: Size of a pixel in units of the image.
    """

    def __init__(self, color: Array, pixel: float):
        """Begins with an image."""
        self.color = color
        self.clear = jnp.ones(color.shape[:2])
        self.pixel = pixel

    def cover(self, distance: Array) -> Array:
        """Coverage of each pixel by a shape, from the signed distance to its edge."""
        return jnp.clip(0.5 - distance / self.pixel, 0, 1)

    def paint(self, color: Array, alpha: Array) -> None:
        """Blends a colour over the image with this opacity."""
        self.clear = self.clear * (1 - alpha)
        alpha = alpha[..., None]
        self.color = self.color * (1 - alpha) + color * alpha


def ellipse(x: Array, y: Array, width: float | Array, height: float | Array) -> Array:
    """Approximate signed distance to an ellipse: exact in sign, accurate near the edge."""
    radius = jnp.sqrt((x / width) ** 2 + (y / height) ** 2 + 1e-9)
    slope = jnp.sqrt((x / width**2) ** 2 + (y / height**2) ** 2 + 1e-9) / radius
    return (radius - 1) / slope
