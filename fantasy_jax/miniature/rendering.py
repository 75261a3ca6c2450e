"""Clips of procedural people, drawn with one compiled program for each number of people, and their faces."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.miniature.acting import Performance
from fantasy_jax.miniature.canvas import Canvas
from fantasy_jax.miniature.faces import SyntheticFace
from fantasy_jax.miniature.painting import background, finish, paint_person
from fantasy_jax.typing import Array, Float

_REACH = 3
"""Width in which a person is painted, shoulders included; a square is 2 wide."""
_FRAMES = 32
"""Frames that are drawn at once, so that one program serves any number of clips of any length."""


def render_batch(
    faces: SyntheticFace,
    performances: Performance,
    places: Float[np.ndarray, "B P"],
    *,
    size: int,
) -> tuple[Float[np.ndarray, "B T {size} W 3"], Float[np.ndarray, "B T {size} W"]]:
    """Renders a batch of clips of P people on canvases of P squares, W = P * size.

    Args:
        faces: The people, leaves `[B, P, ...]`; later ones are in front of earlier ones. Background, light
            and lens are those of the first.
        performances: Their motion, leaves `[B, P, T]`.
        places: Horizontal centres of their squares; 0 is the middle of the canvas.
        size: Height in pixels.

    Returns:
        Pixels in [-1, 1], and the lip mask: 1 inside the outer edge of visible lips.
    """
    clips, people, num_frames = np.shape(performances.turn)
    total = clips * num_frames
    rows = (
        jax.tree.map(lambda x: np.repeat(np.asarray(x, np.float32), num_frames, axis=0), faces),
        jax.tree.map(lambda x: np.moveaxis(x, 2, 1).reshape(total, people), performances),
        np.repeat(places, num_frames, axis=0),
    )
    drawn = []
    for start in range(0, total, _FRAMES):
        chosen = np.minimum(np.arange(start, start + _FRAMES), total - 1)
        drawn.append(_frames(*jax.tree.map(lambda x, chosen=chosen: x[chosen], rows), size=size))
    pixels, lips = (np.concatenate(parts)[:total] for parts in zip(*drawn, strict=True))
    return tuple(x.reshape(clips, num_frames, *x.shape[1:]) for x in (pixels, lips))


@partial(jax.jit, static_argnames="size")
def _frames(
    faces: SyntheticFace, acts: Performance, places: Float[Array, "N P"], *, size: int
) -> tuple[Float[Array, "N {size} W 3"], Float[Array, "N {size} W"]]:
    """Renders frames, each of its own people."""
    return jax.vmap(partial(_frame, size=size))(faces, acts, places)


def _frame(faces: SyntheticFace, acts: Performance, places: Array, size: int) -> tuple[Array, Array]:
    people = len(places)
    y, x = ((jnp.arange(length) + 0.5) * 2 / size - length / size for length in (size, people * size))
    y, x = jnp.meshgrid(y, x, indexing="ij")
    first = jax.tree.map(lambda leaf: leaf[0], faces)

    width = min(people * size, _REACH * size // 2)

    def paint(painted: tuple[Array, Array], person: tuple) -> tuple[tuple[Array, Array], None]:
        face, act, place = person
        left = jnp.int32((place + people - _REACH / 2) * size / 2).clip(0, people * size - width)
        color, lips, own_x, own_y = (
            jax.lax.dynamic_slice_in_dim(image, left, width, axis=1) for image in (*painted, x - place, y)
        )
        canvas = Canvas(color, 2 / size)
        own_lips = paint_person(canvas, face, act, own_x, own_y)
        changed = canvas.color, lips * canvas.clear + own_lips
        update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=left, axis=1)
        return jax.tree.map(update, painted, changed), None

    start = background(first, x, y), jnp.zeros_like(x)
    # One person's painting is compiled, whatever their number.
    (color, lips), _ = jax.lax.scan(paint, start, (faces, acts, places))
    return finish(color, first, size), lips


def face_box(face: SyntheticFace, performance: Performance, place: float = 0.0) -> Float[np.ndarray, "T 4"]:
    """Left, top, right, bottom of the head in every frame, in units of the image.

    Args:
        face: The face.
        performance: Its motion.
        place: Horizontal centre of the person's square; 0 is the middle of the canvas.
    """
    x = face.centre[0] + np.asarray(performance.shift_x) + place
    y = face.centre[1] + np.asarray(performance.shift_y)
    width, height = face.size
    return np.stack([x - width, y - height, x + width, y + height], axis=1).astype(np.float32)


def face_points(
    face: SyntheticFace, performance: Performance, place: float = 0.0
) -> Float[np.ndarray, "T 5 2"]:
    """Eyes, tip of the nose and corners of the mouth in every frame, in the order of `landmarks.five_points`.

    They lie where the face shows them, as a detector would find them. Arguments and units are those of
    `face_box`.
    """
    act = performance
    eye, apart = face.eyes[:2]
    width = face.mouth[1] * (1 - 0.32 * act.rounding) * (1 - 0.06 * act.opening) * (1 + 0.13 * act.smile)
    still = np.zeros_like(act.turn)
    nose_u, nose_v = 0.45 * face.relief * act.turn, face.nose[1] - 0.08 + 0.35 * face.relief * act.nod
    mouth = face.mouth[0] + 0.35 * face.mouth[3] * act.opening - 0.072 * act.smile
    u = np.stack(
        [still - apart, still + apart, nose_u, 0.06 * act.jaw - width, 0.06 * act.jaw + width], axis=1
    )
    v = np.stack(
        [still + eye, still + eye, nose_v, mouth + 0.05 * act.asymmetry, mouth - 0.05 * act.asymmetry], axis=1
    )
    hx = face.size[0] * _seen(u, act.turn[:, None], face.relief)
    hy = face.size[1] * _seen(v, act.nod[:, None], face.relief)
    cos, sin = np.cos(act.roll)[:, None], np.sin(act.roll)[:, None]
    x = cos * hx - sin * hy + face.centre[0] + act.shift_x[:, None] + place
    y = sin * hx + cos * hy + face.centre[1] + act.shift_y[:, None]
    return np.stack([x, y], axis=-1).astype(np.float32)


def _seen(
    place: Float[np.ndarray, "T 5"], rotation: Float[np.ndarray, "T 1"], relief: float
) -> Float[np.ndarray, "T 5"]:
    """Place of the head where a coordinate on the face is seen, the inverse of `painting.over_the_head`."""
    flat = place + rotation
    depth = np.sqrt(np.clip(1 - place**2, 0, 1))
    return flat + relief * (place * np.sqrt(1 - rotation**2) + rotation * depth - flat)
