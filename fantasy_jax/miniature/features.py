"""Painting of eyes, brows, nose, wrinkles, beard and mouth of a procedural face.

Coordinates u and v are those of the face, in units of the head (`painting.over_the_head`).
"""

import jax.numpy as jnp

from fantasy_jax.miniature.acting import Performance
from fantasy_jax.miniature.canvas import Canvas, ellipse
from fantasy_jax.miniature.faces import SyntheticFace, brow_color
from fantasy_jax.typing import Array


def paint_features(canvas: Canvas, face: SyntheticFace, act: Performance, u: Array, v: Array) -> None:
    """Paints everything of the face but beard and mouth."""
    _paint_wrinkles(canvas, face, act, u, v)
    for side in (-1.0, 1.0):
        _paint_eye(canvas, face, act, side, u - side * face.eyes[1], v - face.eyes[0])
    # The nose is nearer than the face, and moves further.
    nose_u, nose_v = u - 0.45 * face.relief * act.turn, v - 0.35 * face.relief * act.nod
    _paint_nose(canvas, face, nose_u, nose_v + 0.025 * act.sneer)


def _paint_eye(
    canvas: Canvas, face: SyntheticFace, act: Performance, side: float, du: Array, dv: Array
) -> None:
    """Paints eye, brow and glasses of one side, with coordinates from the centre of the eye."""
    _, _, width, height = face.eyes
    scale = face.size[1]  # from units of the head to units of the image
    open_height = height * (1 - 0.9 * act.blink) * (1 + 0.45 * act.lid)
    lens = canvas.cover(ellipse(du, dv, width, open_height) * scale)
    canvas.paint(jnp.array([0.93, 0.92, 0.90]), lens)
    iris_u, iris_v = du - 0.09 * act.gaze_x, dv - 0.05 * act.gaze_y
    iris = canvas.cover(ellipse(iris_u, iris_v, 0.085, 0.075) * scale) * lens
    canvas.paint(face.iris, iris)
    pupil = canvas.cover(ellipse(iris_u, iris_v, 0.04, 0.036) * scale) * lens
    canvas.paint(jnp.array([0.03, 0.03, 0.03]), pupil)
    lid = jnp.abs(ellipse(du, dv, width, open_height)) - 0.016
    canvas.paint(face.skin * 0.35, canvas.cover(lid * scale) * (dv < 0.02) * 0.8)
    _paint_brow(canvas, face, act, side, du, dv)
    rim = jnp.abs(ellipse(du, dv, width * 1.35, height * 2.1)) - 0.022
    canvas.paint(jnp.array([0.08, 0.08, 0.09]), canvas.cover(rim * scale) * face.glasses)


def _paint_brow(
    canvas: Canvas, face: SyntheticFace, act: Performance, side: float, du: Array, dv: Array
) -> None:
    width, scale = face.eyes[2], face.size[1]
    du = du + side * 0.05 * act.furrow
    outer = jnp.clip(0.5 + side * du / (2.3 * width), 0, 1)
    raised = 0.085 * (act.brow_inner * (1 - outer) + act.brow_outer * outer)
    bow = dv + face.brows[1] + 0.06 * (1 - (du / width) ** 2) + raised
    brow = jnp.maximum(jnp.abs(bow) - face.brows[0], jnp.abs(du) - 1.15 * width)
    canvas.paint(brow_color(face), canvas.cover(brow * scale) * 0.9)


def _paint_wrinkles(canvas: Canvas, face: SyntheticFace, act: Performance, u: Array, v: Array) -> None:
    """Paints the folds of the skin that accompany raised and drawn brows, smiles and sneers."""
    level, dark = face.eyes[0], face.skin * 0.6
    brows = level - face.brows[1]

    def line(distance: Array, thickness: float) -> Array:
        return jnp.exp(-((distance / thickness) ** 2))

    between = line(jnp.abs(u) - 0.055, 0.022) * line(v - brows, 0.09)
    canvas.paint(dark, 0.75 * jnp.clip(act.furrow, 0, 1) * between)
    raised = jnp.clip(0.5 * (act.brow_inner + act.brow_outer) - 0.25, 0, 1)
    forehead = line(v - brows + 0.27 - 0.05 * u**2, 0.018) + line(v - brows + 0.35 - 0.05 * u**2, 0.018)
    canvas.paint(dark, 0.5 * raised * jnp.clip(forehead, 0, 1) * line(u, 0.4))
    bridge = line(v - level - 0.05 - 0.3 * u**2, 0.02) + line(v - level - 0.13 - 0.3 * u**2, 0.02)
    canvas.paint(dark, 0.65 * jnp.clip(act.sneer, 0, 1) * jnp.clip(bridge, 0, 1) * line(u, 0.12))
    # From the wings of the nose to beside the corners of the mouth.
    top, bottom = face.nose[1] - 0.1, face.mouth[0]
    along = (v - top) / (bottom - top)
    fold = line(jnp.abs(u) - face.nose[0] - 0.06 - 0.2 * jnp.clip(along, 0, 1.2), 0.025)
    fold = fold * jnp.clip(4 * along, 0, 1) * jnp.clip(3 * (0.9 - along), 0, 1)
    canvas.paint(dark, jnp.clip(0.35 * jnp.clip(act.smile, 0, 1) + 0.5 * act.sneer, 0, 0.6) * fold)


def _paint_nose(canvas: Canvas, face: SyntheticFace, u: Array, v: Array) -> None:
    width, length = face.nose
    tip = -0.08 + length
    side = jnp.exp(-(((u - 0.5 * width) / 0.05) ** 2)) * jnp.clip((v + 0.1) / length, 0, 1) * (v < tip)
    canvas.paint(face.skin * 0.8, 0.5 * side)
    shade = jnp.exp(-((u / width) ** 2) - ((v - tip) / 0.035) ** 2)
    canvas.paint(face.skin * 0.6, 0.6 * shade)
    canvas.paint(
        jnp.clip(face.skin * 1.2, 0, 1), 0.4 * jnp.exp(-((u / 0.05) ** 2) - ((v - tip + 0.09) / 0.08) ** 2)
    )


def paint_beard(canvas: Canvas, face: SyntheticFace, head: Array, u: Array, v: Array) -> None:
    """Paints the beard inside the head, whose signed distance is `head`."""
    alpha = jnp.clip((v - 0.36 + 0.3 * u**2) / 0.2, 0, 1) * canvas.cover(head)
    canvas.paint(face.hair * 0.8, face.beard * alpha)


def paint_mouth(canvas: Canvas, face: SyntheticFace, act: Performance, u: Array, v: Array) -> Array:
    """Paints the lips and, between them, the dark mouth, teeth and tongue; returns the lip mask."""
    level, width, thickness, most = face.mouth
    scale = face.size[1]
    width = width * (1 - 0.32 * act.rounding) * (1 - 0.06 * act.opening) * (1 + 0.13 * act.smile)
    half = most * act.opening
    above = half + 0.045 * act.sneer
    u = u - 0.1 * act.jaw * jnp.clip(0.6 + (v - level) / 0.2, 0, 1)
    along = jnp.clip(u / width, -1.2, 1.2)
    corners = 0.12 * act.smile * (along**2 - 0.4) + 0.05 * act.asymmetry * along
    dv = v - level - 0.35 * half + corners  # the upper lip stays, the jaw drops
    opened = jnp.where(dv < 0, above, half)
    arc = jnp.clip(1 - (u / width) ** 2, 0, 1)
    inner_arc = jnp.clip(1 - (u / (0.88 * width)) ** 2, 0, 1)
    bow = 1 - 0.25 * jnp.exp(-((u / 0.06) ** 2)) * (dv < 0)
    outer = jnp.abs(dv) - (opened + thickness * bow) * jnp.sqrt(arc) * jnp.where(dv < 0, 0.95, 1.1)
    inner = jnp.abs(dv) - opened * jnp.sqrt(inner_arc)
    lips = canvas.cover(outer * scale) * (arc > 0)
    gloss = 1 + 0.18 * jnp.exp(-(((dv - half - 0.5 * thickness) / 0.03) ** 2))[..., None]
    canvas.paint(face.lips * gloss, lips)
    line = canvas.cover((jnp.abs(dv) - 0.012) * scale) * (inner_arc > 0)
    canvas.paint(face.lips * 0.45, line)
    hole = (
        canvas.cover(inner * scale) * jnp.clip((half + 0.5 * (above - half)) / 0.02, 0, 1) * (inner_arc > 0)
    )
    canvas.paint(jnp.array([0.12, 0.03, 0.04]), hole)
    edge = dv + above * jnp.sqrt(inner_arc) - 0.3 * half - 0.8 * (above - half) - 0.02
    teeth = jnp.clip(0.5 - edge * scale / canvas.pixel, 0, 1)
    shown = jnp.clip(act.opening * 4 - 0.6 + 2 * act.sneer, 0, 1)
    canvas.paint(jnp.array([0.92, 0.90, 0.86]), hole * teeth * shown)
    tongue = canvas.cover(ellipse(u, dv - half, 0.6 * width, 0.6 * half + 1e-3) * scale)
    canvas.paint(jnp.array([0.62, 0.25, 0.26]), hole * tongue * 0.9)
    return lips
