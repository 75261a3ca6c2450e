"""Painting of procedural people: background, body, hair and head (`features` has what is on a face).

Shapes are ellipses and arcs with soft edges one pixel wide. What acting adds to a shape vanishes exactly
where the factors are 0 and the head is flat.
"""

import jax.numpy as jnp

from fantasy_jax.miniature.acting import Performance
from fantasy_jax.miniature.canvas import Canvas, ellipse
from fantasy_jax.miniature.faces import SyntheticFace
from fantasy_jax.miniature.features import paint_beard, paint_features, paint_mouth
from fantasy_jax.typing import Array


def paint_person(canvas: Canvas, face: SyntheticFace, act: Performance, x: Array, y: Array) -> Array:
    """Paints a person in one frame over what the canvas shows.

    Args:
        canvas: The image.
        face: The face.
        act: Its motion in this frame.
        x: Horizontal coordinates of the pixels in the square of this person, `[H, W]`.
        y: Vertical ones.

    Returns:
        The lip mask `[H, W]`: 1 inside the outer edge of the lips.
    """
    _paint_body(canvas, face, act, x, y)

    # Coordinates of the head: shifted and rolled with it, in units of the image.
    hx, hy = x - face.centre[0] - act.shift_x, y - face.centre[1] - act.shift_y
    cos, sin = jnp.cos(act.roll), jnp.sin(act.roll)
    hx, hy = cos * hx + sin * hy, cos * hy - sin * hx
    width, height = face.size

    _paint_hair_behind(canvas, face, hx, hy)
    chin = jnp.clip(hy / height, 0, 1)
    jaw_width = width * (1 - (0.2 - 0.14 * face.jaw) * chin**2)
    jaw_height = height * (1 + 0.07 * act.opening * (hy > 0))
    head = ellipse(hx - 0.09 * act.jaw * width * chin**2, hy, jaw_width, jaw_height)
    for side in (-1.0, 1.0):
        # The ear on the side to which the head turns disappears behind it, the other one appears.
        place = side * width * (1 - 0.35 * face.relief * side * act.turn)
        canvas.paint(face.skin * 0.88, canvas.cover(ellipse(hx - place, hy, 0.1 * width, 0.17 * height)))
    canvas.paint(_shaded_skin(face, hx, hy, act), canvas.cover(head))

    u = over_the_head(hx / width, act.turn, face.relief)
    v = over_the_head(hy / height, act.nod, face.relief)
    paint_features(canvas, face, act, u, v)
    paint_beard(canvas, face, head, u, v)
    lips = paint_mouth(canvas, face, act, u, v)
    _paint_fringe(canvas, face, act, head, hx, hy)
    return lips


def over_the_head(place: Array, rotation: Array, relief: Array) -> Array:
    """Coordinate on the face of what is seen at a place of the head, both in units of the head.

    Args:
        place: Horizontal or vertical place.
        rotation: Turn or nod.
        relief: 0 for a flat face that is shifted by the rotation, 1 for a sphere.
    """
    flat = place - rotation
    depth = jnp.sqrt(jnp.clip(1 - place**2, 0, 1) + 1e-9)
    round_ = place * jnp.sqrt(1 - rotation**2) - rotation * depth
    return flat + relief * (round_ - flat)


def finish(color: Array, face: SyntheticFace, size: int) -> Array:
    """Light and lens of the camera; returns pixels in [-1, 1]."""
    color = jnp.clip(color * face.light[3] * face.tint, 0, 1)
    return _blur(color, face.softness * size / 2) * 2 - 1


def _blur(image: Array, std: Array) -> Array:
    """Blurs an image with a Gaussian of `std` pixels, as a lens does."""

    def kernel(length: int) -> Array:
        place = jnp.arange(length)
        weights = jnp.exp(-0.5 * ((place[:, None] - place) / std) ** 2)
        return weights / weights.sum(axis=1, keepdims=True)

    return jnp.einsum("yr,rcd,xc->yxd", kernel(image.shape[0]), image, kernel(image.shape[1]))


def background(face: SyntheticFace, x: Array, y: Array) -> Array:
    """Colours of the background, before light and lens."""
    mix = jnp.clip(0.5 + 0.35 * (x * face.textures[0, 0] / 5 + y), 0, 1)[..., None]
    color = face.background[0] * (1 - mix) + face.background[1] * mix
    for fx, fy, phase, amplitude, sharpness in face.textures:
        wave = jnp.tanh(sharpness * jnp.sin(fx * x + fy * y + phase))
        color = color + amplitude * wave[..., None]
    return jnp.clip(color, 0, 1)


def _paint_body(canvas: Canvas, face: SyntheticFace, act: Performance, x: Array, y: Array) -> None:
    middle = face.centre[0] + act.body
    bottom = face.centre[1] + face.size[1]
    shoulders = canvas.cover(ellipse(x - middle, y - bottom - 0.55, 0.95, 0.6))
    shade = 1 - 0.15 * jnp.sin(7 * (x - middle))[..., None]
    canvas.paint(face.clothes * shade, shoulders)
    half = 0.5 * face.size[0]
    collar = 0.15 * face.relief * ((x - middle) / half) ** 2
    neck = jnp.maximum(jnp.abs(x - middle) - half, jnp.abs(y - bottom) - 0.22 + collar)
    canvas.paint(face.skin * 0.72, canvas.cover(neck))


def _paint_hair_behind(canvas: Canvas, face: SyntheticFace, hx: Array, hy: Array) -> None:
    width, height = face.size
    _, length, volume = face.hair_shape
    crown = ellipse(hx, hy + 0.06 * height, width * (1.02 + volume), height * (1.02 + volume))
    below = hy / height - length
    alpha = canvas.cover(crown) * jnp.clip(0.5 - below / 0.1, 0, 1)
    canvas.paint(face.hair * 0.85, alpha)


def _paint_fringe(
    canvas: Canvas, face: SyntheticFace, act: Performance, head: Array, hx: Array, hy: Array
) -> None:
    width, height = face.size
    hx = hx - 0.6 * face.relief * act.turn * width
    line = hy / height - face.hair_shape[0] - 0.35 * (hx / width) ** 2 - 0.7 * face.relief * act.nod
    alpha = canvas.cover(head) * jnp.clip(0.5 - line / 0.06, 0, 1)
    strands = 1 + 0.08 * jnp.sin(22 * hx / width + 3 * hy)[..., None]
    canvas.paint(face.hair * strands, alpha)


def _shaded_skin(face: SyntheticFace, hx: Array, hy: Array, act: Performance) -> Array:
    """Skin of a rounded head under a directional light."""
    nx, ny = hx / face.size[0] - act.turn, hy / face.size[1] - act.nod
    depth = jnp.sqrt(jnp.clip(1 - nx**2 - ny**2, 0, 1))
    light = face.light[2] * (face.light[0] * nx + face.light[1] * ny) + 0.25 * (depth - 0.8)
    cheeks = 0.06 * sum(jnp.exp(-(((nx - s * 0.5) / 0.22) ** 2) - ((ny - 0.22) / 0.18) ** 2) for s in (-1, 1))
    color = face.skin * (1 + light)[..., None]
    return color + cheeks[..., None] * jnp.array([0.6, -0.3, -0.2])
