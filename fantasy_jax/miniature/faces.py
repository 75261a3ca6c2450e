"""The numbers of procedural faces: portraits with hair, light and background.

`acting` has their motion, `painting` draws them. Image coordinates run from -1 at the left and top to 1 at
the right and bottom of the square of a person; a unit is half the height of the image.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np

from fantasy_jax.typing import Float, Leaf

_TEXTURES = 4
_BROW_CONTRAST, _THINNEST_BROW = 0.42, 0.036
"""Least distance of the colours of brows and skin, and least thickness of brows, of faces that act."""
_ACTING_EYES = np.array([1.0, 1.0, 1.15, 1.35])
"""Factors of `SyntheticFace.eyes` of faces that act."""


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
        brow_shade: Factor of the colour of the brows.
        relief: Depth of the head: 1 for a sphere, over which features move when it turns; 0 for a flat head.
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
    brow_shade: Leaf
    relief: Leaf


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
        brow_shade=1.0,
        relief=0.0,
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


def acting_face(face: SyntheticFace) -> SyntheticFace:
    """The same face with what acting needs: depth, larger eyes, and brows that differ from the skin.

    Light is closer to white and the lens sharper, so that colours and small features are those of the face.
    """
    brow = brow_color(face)
    shade = 1.0
    while np.linalg.norm(face.skin - shade * brow) < _BROW_CONTRAST and shade > 0.1:
        shade -= 0.05
    thickness, height = face.brows
    brows = np.array([max(thickness, _THINNEST_BROW), height])
    return replace(
        face,
        eyes=face.eyes * _ACTING_EYES,
        brows=brows,
        brow_shade=shade,
        tint=1 + 0.5 * (face.tint - 1),
        softness=0.8 * face.softness,
        relief=1.0,
    )


def brow_color(face: SyntheticFace) -> Leaf:
    """Colour of the brows, a little darker than the hair."""
    return (face.hair * 0.7 + 0.05) * face.brow_shade


def in_one_place(faces: list[SyntheticFace]) -> list[SyntheticFace]:
    """The same faces in the light and in front of the background of the first."""
    first = faces[0]
    shared = {name: getattr(first, name) for name in ("background", "textures", "light", "tint", "softness")}
    return [replace(face, **shared) for face in faces]


def stack_faces(faces: list[SyntheticFace]) -> SyntheticFace:
    """Stacks faces along a new leading axis, for `render_batch`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *faces)
