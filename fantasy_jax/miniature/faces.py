"""Procedural faces: portraits with hair, light and background, with controlled mouth, eyes and head pose.

A face is a set of numbers (`SyntheticFace`), its motion a set of curves (`Performance`); `render_batch` draws
clips with one compiled program. Shapes are ellipses and arcs with soft edges one pixel wide. Image
coordinates run from -1 at the left and top to 1 at the right and bottom; a unit is half the image.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.typing import Array, Float, Leaf

_TEXTURES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SyntheticFace:
    """One person in front of one background; colours are RGB in [0, 1].

    Attributes:
        centre: Centre of the head, x and y.
        size: Half width and half height of the head.
        jaw: Squareness of the jaw, from 0 to 1.
        skin: Colour of the skin.
        hair: Colour of the hair.
        hair_shape: Height of the hairline, length at the sides, volume (fraction of the head's size).
        eyes: Height of the eyes, distance from the middle, half width, half height (in units of the head).
        iris: Colour of the irises.
        brows: Thickness, and height above the eyes.
        nose: Half width and length.
        mouth: Height, half width, thickness of the lips, largest half opening (in units of the head).
        lips: Colour of the lips.
        beard: Opacity of the beard; 0 for none.
        glasses: Opacity of the glasses; 0 for none.
        clothes: Colour of the clothes.
        background: Two colours, `[2, 3]`.
        textures: Waves over the background, `[4, 5]`: frequency x, y, phase, amplitude, sharpness.
        light: Direction x and y, strength, and overall brightness.
        tint: Colour of the light.
        softness: Standard deviation of the lens blur.
    """

    centre: Leaf
    size: Leaf
    jaw: Leaf
    skin: Leaf
    hair: Leaf
    hair_shape: Leaf
    eyes: Leaf
    iris: Leaf
    brows: Leaf
    nose: Leaf
    mouth: Leaf
    lips: Leaf
    beard: Leaf
    glasses: Leaf
    clothes: Leaf
    background: Leaf
    textures: Leaf
    light: Leaf
    tint: Leaf
    softness: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Performance:
    """Motion of a face, one value per video frame (`[T]`).

    Attributes:
        opening: Opening of the mouth, from 0; 1 is the widest opening of speech in a usual clip.
        rounding: Rounding of the lips, from 0 to 1.
        blink: Closing of the lids, from 0 (open) to 1 (shut).
        shift_x: Horizontal shift of the head.
        shift_y: Vertical shift of the head.
        roll: In-plane rotation of the head in radians.
        turn: Rotation to the side, as a shift of the features in units of the head.
        nod: Rotation up and down, as a shift of the features in units of the head.
        body: Horizontal shift of the shoulders.
    """

    opening: Leaf
    rounding: Leaf
    blink: Leaf
    shift_x: Leaf
    shift_y: Leaf
    roll: Leaf
    turn: Leaf
    nod: Leaf
    body: Leaf


def draw_face(rng: np.random.Generator, *, unseen: bool = False) -> SyntheticFace:
    """Draws the numbers of a random face.

    Args:
        rng: Random generator.
        unseen: Take sizes, mouth and light from just outside the usual ranges, to test measurements on faces
            outside the training distribution.
    """
    skin = _skin(rng)
    edge = rng.choice([-1.0, 1.0]) if unseen else 0.0

    def between(low: float, high: float) -> float:
        """Uniform in the range; for an unseen face up to a quarter of its width outside."""
        if not unseen:
            return rng.uniform(low, high)
        beyond = rng.uniform(0.02, 0.25) * (high - low)
        return high + beyond if edge > 0 else low - beyond

    height = between(0.58, 0.86)
    return SyntheticFace(
        # From where the hair touches the upper edge to a little below the middle.
        centre=np.array([rng.uniform(-0.1, 0.1), rng.uniform(height - 1.0, 0.02)]),
        size=np.array([height * between(0.70, 0.82), height]),
        jaw=rng.uniform(),
        skin=skin,
        hair=_hair(rng),
        hair_shape=np.array([rng.uniform(-0.8, -0.5), rng.choice([-0.5, 0.1, 0.9]), rng.uniform(0.05, 0.2)]),
        eyes=np.array(
            [rng.uniform(-0.22, -0.12), between(0.34, 0.42), rng.uniform(0.15, 0.19), rng.uniform(0.07, 0.1)]
        ),
        iris=rng.uniform(0.05, 0.45, 3) * np.array([1.0, 0.9, rng.uniform(0.6, 1.4)]),
        brows=np.array([rng.uniform(0.025, 0.055), rng.uniform(0.14, 0.2)]),
        nose=np.array([rng.uniform(0.1, 0.16), rng.uniform(0.3, 0.38)]),
        mouth=np.array(
            [rng.uniform(0.50, 0.56), between(0.34, 0.44), between(0.05, 0.085), between(0.19, 0.25)]
        ),
        lips=_lips(rng, skin),
        beard=rng.uniform(0.1, 0.5) * (rng.uniform() < 0.15),
        glasses=rng.uniform(0.5, 1.0) * (rng.uniform() < 0.12),
        clothes=rng.uniform(0.05, 0.9, 3),
        background=_backdrop(rng),
        textures=np.stack(
            [
                np.array(
                    [*rng.normal(0, 5, 2), rng.uniform(0, 6.3), rng.uniform(-0.12, 0.12), rng.uniform(1, 4)]
                )
                for _ in range(_TEXTURES)
            ]
        ),
        light=np.array([*rng.normal(0, 0.5, 2), between(0.1, 0.35), between(0.8, 1.1)]),
        tint=1 + rng.normal(0, 0.05, 3),
        softness=rng.uniform(0.018, 0.03),
    )


def _skin(rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    tones = np.array([[0.96, 0.82, 0.72], [0.87, 0.68, 0.54], [0.72, 0.52, 0.38], [0.42, 0.28, 0.20]])
    place = rng.uniform(0, len(tones) - 1.001)
    low, fraction = int(place), place % 1
    return np.clip((1 - fraction) * tones[low] + fraction * tones[low + 1] + rng.normal(0, 0.02, 3), 0.1, 1)


def _backdrop(rng: np.random.Generator) -> Float[np.ndarray, "2 3"]:
    """Two colours, rarely saturated."""
    colors = rng.uniform(0.05, 0.95, (2, 3))
    grey = colors.mean(axis=1, keepdims=True)
    return grey + rng.uniform(0.1, 0.9) * (colors - grey)


def _hair(rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    tones = np.array(
        [[0.08, 0.06, 0.05], [0.25, 0.15, 0.08], [0.5, 0.3, 0.15], [0.8, 0.65, 0.4], [0.7, 0.7, 0.7]]
    )
    return np.clip(
        tones[rng.integers(len(tones))] * rng.uniform(0.7, 1.2) + rng.normal(0, 0.02, 3), 0.02, 0.95
    )


def _lips(rng: np.random.Generator, skin: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
    """A colour redder than the skin, with enough contrast that a closed mouth is visible on dark skin too."""
    red = np.array([0.72, 0.28, 0.30]) + rng.normal(0, 0.06, 3)
    lips = skin * 0.55 + red * 0.45
    darker = skin - lips
    lift = max(0.22 - np.linalg.norm(darker), 0.0)
    return np.clip(lips - lift * darker / (np.linalg.norm(darker) + 1e-6), 0.05, 0.95)


def stack_faces(faces: list[SyntheticFace]) -> SyntheticFace:
    """Stacks faces along a new leading axis, for `render_batch`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *faces)


def face_box(face: SyntheticFace, performance: Performance) -> Float[np.ndarray, "T 4"]:
    """Left, top, right, bottom of the head in every frame, in [-1, 1] of the image."""
    x = face.centre[0] + np.asarray(performance.shift_x)
    y = face.centre[1] + np.asarray(performance.shift_y)
    width, height = face.size
    return np.stack([x - width, y - height, x + width, y + height], axis=1).astype(np.float32)


@partial(jax.jit, static_argnames="size")
def render(
    face: SyntheticFace, performance: Performance, *, size: int
) -> tuple[Float[Array, "T {size} {size} 3"], Float[Array, "T {size} {size}"]]:
    """Renders a clip.

    Args:
        face: The face.
        performance: Its motion.
        size: Height and width in pixels.

    Returns:
        Pixels in [-1, 1], and the lip mask: 1 inside the outer edge of the lips.
    """
    face = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), face)
    return jax.vmap(lambda frame: _frame(face, frame, size))(performance)


@partial(jax.jit, static_argnames="size")
def render_batch(
    faces: SyntheticFace, performances: Performance, *, size: int
) -> tuple[Float[Array, "B T {size} {size} 3"], Float[Array, "B T {size} {size}"]]:
    """`render` for a batch of clips of one length."""
    return jax.vmap(lambda face, performance: render(face, performance, size=size))(faces, performances)


class _Canvas:
    """An image onto which shapes are painted one over the other."""

    def __init__(self, color: Array, pixel: float):
        self.color = color
        self.pixel = pixel

    def cover(self, distance: Array) -> Array:
        """Coverage of each pixel by a shape, from the signed distance to its edge."""
        return jnp.clip(0.5 - distance / self.pixel, 0, 1)

    def paint(self, color: Array, alpha: Array) -> None:
        """Blends a colour over the image with this opacity."""
        alpha = alpha[..., None]
        self.color = self.color * (1 - alpha) + color * alpha


def _ellipse(x: Array, y: Array, width: float | Array, height: float | Array) -> Array:
    """Approximate signed distance to an ellipse: exact in sign, accurate near the edge."""
    radius = jnp.sqrt((x / width) ** 2 + (y / height) ** 2 + 1e-9)
    slope = jnp.sqrt((x / width**2) ** 2 + (y / height**2) ** 2 + 1e-9) / radius
    return (radius - 1) / slope


def _frame(face: SyntheticFace, act: Performance, size: int) -> tuple[Array, Array]:
    axis = (jnp.arange(size) + 0.5) * 2 / size - 1
    y, x = jnp.meshgrid(axis, axis, indexing="ij")
    canvas = _Canvas(_background(face, x, y), 2 / size)
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
    head = _ellipse(hx, hy, jaw_width, jaw_height)
    for side in (-1.0, 1.0):
        canvas.paint(
            face.skin * 0.88, canvas.cover(_ellipse(hx - side * width, hy, 0.1 * width, 0.17 * height))
        )
    canvas.paint(_shaded_skin(face, hx, hy, act), canvas.cover(head))

    # Coordinates of the features, in units of the head; turn and nod shift them over the head.
    u, v = hx / width - act.turn, hy / height - act.nod
    _paint_eyes(canvas, face, act, u, v)
    _paint_nose(canvas, face, u, v)
    _paint_beard(canvas, face, head, u, v)
    lips = _paint_mouth(canvas, face, act, u, v)
    _paint_fringe(canvas, face, head, hx, hy)
    color = jnp.clip(canvas.color * face.light[3] * face.tint, 0, 1)
    return _blur(color, face.softness * size / 2) * 2 - 1, lips


def _blur(image: Array, std: Array) -> Array:
    """Blurs an image with a Gaussian of `std` pixels, as a lens does."""
    place = jnp.arange(image.shape[0])
    kernel = jnp.exp(-0.5 * ((place[:, None] - place) / std) ** 2)
    kernel = kernel / kernel.sum(axis=1, keepdims=True)
    return jnp.einsum("yr,rcd,xc->yxd", kernel, image, kernel)


def _background(face: SyntheticFace, x: Array, y: Array) -> Array:
    mix = jnp.clip(0.5 + 0.35 * (x * face.textures[0, 0] / 5 + y), 0, 1)[..., None]
    color = face.background[0] * (1 - mix) + face.background[1] * mix
    for fx, fy, phase, amplitude, sharpness in face.textures:
        wave = jnp.tanh(sharpness * jnp.sin(fx * x + fy * y + phase))
        color = color + amplitude * wave[..., None]
    return jnp.clip(color, 0, 1)


def _paint_body(canvas: _Canvas, face: SyntheticFace, act: Performance, x: Array, y: Array) -> None:
    middle = face.centre[0] + act.body
    bottom = face.centre[1] + face.size[1]
    shoulders = canvas.cover(_ellipse(x - middle, y - bottom - 0.55, 0.95, 0.6))
    shade = 1 - 0.15 * jnp.sin(7 * (x - middle))[..., None]
    canvas.paint(face.clothes * shade, shoulders)
    neck = jnp.maximum(jnp.abs(x - middle) - 0.5 * face.size[0], jnp.abs(y - bottom) - 0.22)
    canvas.paint(face.skin * 0.72, canvas.cover(neck))


def _paint_hair_behind(canvas: _Canvas, face: SyntheticFace, hx: Array, hy: Array) -> None:
    width, height = face.size
    _, length, volume = face.hair_shape
    crown = _ellipse(hx, hy + 0.06 * height, width * (1.02 + volume), height * (1.02 + volume))
    below = hy / height - length
    alpha = canvas.cover(crown) * jnp.clip(0.5 - below / 0.1, 0, 1)
    canvas.paint(face.hair * 0.85, alpha)


def _paint_fringe(canvas: _Canvas, face: SyntheticFace, head: Array, hx: Array, hy: Array) -> None:
    width, height = face.size
    line = hy / height - face.hair_shape[0] - 0.35 * (hx / width) ** 2
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


def _paint_eyes(canvas: _Canvas, face: SyntheticFace, act: Performance, u: Array, v: Array) -> None:
    level, apart, width, height = face.eyes
    scale = face.size[1]  # from units of the head to units of the image
    for side in (-1.0, 1.0):
        du, dv = u - side * apart, v - level
        open_height = height * (1 - 0.9 * act.blink)
        lens = canvas.cover(_ellipse(du, dv, width, open_height) * scale)
        canvas.paint(jnp.array([0.93, 0.92, 0.90]), lens)
        iris = canvas.cover(_ellipse(du, dv, 0.085, 0.075) * scale) * lens
        canvas.paint(face.iris, iris)
        canvas.paint(
            jnp.array([0.03, 0.03, 0.03]), canvas.cover(_ellipse(du, dv, 0.04, 0.036) * scale) * lens
        )
        lid = jnp.abs(_ellipse(du, dv, width, open_height)) - 0.016
        canvas.paint(face.skin * 0.35, canvas.cover(lid * scale) * (dv < 0.02) * 0.8)
        bow = dv + face.brows[1] + 0.06 * (1 - (du / width) ** 2)
        brow = jnp.maximum(jnp.abs(bow) - face.brows[0], jnp.abs(du) - 1.15 * width)
        canvas.paint(face.hair * 0.7 + 0.05, canvas.cover(brow * scale) * 0.9)
        rim = jnp.abs(_ellipse(du, dv, width * 1.35, height * 2.1)) - 0.022
        canvas.paint(jnp.array([0.08, 0.08, 0.09]), canvas.cover(rim * scale) * face.glasses)


def _paint_nose(canvas: _Canvas, face: SyntheticFace, u: Array, v: Array) -> None:
    width, length = face.nose
    tip = -0.08 + length
    side = jnp.exp(-(((u - 0.5 * width) / 0.05) ** 2)) * jnp.clip((v + 0.1) / length, 0, 1) * (v < tip)
    canvas.paint(face.skin * 0.8, 0.5 * side)
    shade = jnp.exp(-((u / width) ** 2) - ((v - tip) / 0.035) ** 2)
    canvas.paint(face.skin * 0.6, 0.6 * shade)
    canvas.paint(
        jnp.clip(face.skin * 1.2, 0, 1), 0.4 * jnp.exp(-((u / 0.05) ** 2) - ((v - tip + 0.09) / 0.08) ** 2)
    )


def _paint_beard(canvas: _Canvas, face: SyntheticFace, head: Array, u: Array, v: Array) -> None:
    alpha = jnp.clip((v - 0.36 + 0.3 * u**2) / 0.2, 0, 1) * canvas.cover(head)
    canvas.paint(face.hair * 0.8, face.beard * alpha)


def _paint_mouth(canvas: _Canvas, face: SyntheticFace, act: Performance, u: Array, v: Array) -> Array:
    """Paints the lips and, between them, the dark mouth, teeth and tongue; returns the lip mask."""
    level, width, thickness, most = face.mouth
    scale = face.size[1]
    width = width * (1 - 0.32 * act.rounding) * (1 - 0.06 * act.opening)
    half = most * act.opening
    dv = v - level - 0.35 * half  # the upper lip stays, the jaw drops
    arc = jnp.clip(1 - (u / width) ** 2, 0, 1)
    inner_arc = jnp.clip(1 - (u / (0.88 * width)) ** 2, 0, 1)
    bow = 1 - 0.25 * jnp.exp(-((u / 0.06) ** 2)) * (dv < 0)
    outer = jnp.abs(dv) - (half + thickness * bow) * jnp.sqrt(arc) * jnp.where(dv < 0, 0.95, 1.1)
    inner = jnp.abs(dv) - half * jnp.sqrt(inner_arc)
    lips = canvas.cover(outer * scale) * (arc > 0)
    gloss = 1 + 0.18 * jnp.exp(-(((dv - half - 0.5 * thickness) / 0.03) ** 2))[..., None]
    canvas.paint(face.lips * gloss, lips)
    line = canvas.cover((jnp.abs(dv) - 0.012) * scale) * (inner_arc > 0)
    canvas.paint(face.lips * 0.45, line)
    hole = canvas.cover(inner * scale) * jnp.clip(half / 0.02, 0, 1) * (inner_arc > 0)
    canvas.paint(jnp.array([0.12, 0.03, 0.04]), hole)
    teeth = jnp.clip(0.5 - (dv + half * jnp.sqrt(inner_arc) - 0.3 * half - 0.02) * scale / canvas.pixel, 0, 1)
    canvas.paint(jnp.array([0.92, 0.90, 0.86]), hole * teeth * jnp.clip(act.opening * 4 - 0.6, 0, 1))
    tongue = canvas.cover(_ellipse(u, dv - half, 0.6 * width, 0.6 * half + 1e-3) * scale)
    canvas.paint(jnp.array([0.62, 0.25, 0.26]), hole * tongue * 0.9)
    return lips
