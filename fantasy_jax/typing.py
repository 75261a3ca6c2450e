"""Array types with shapes, and the letters that name dimensions.

The same letters are used in shape strings and in prose:

    B       batch
    T       video frames, 4k + 1
    F       latent frames, k + 1
    H W     height and width in pixels
    h w     height and width in latents (of a tile or an image, an eighth of the pixels)
    S       spatial tokens of one latent frame, h/2 * w/2
    L       tokens of text, or of any cross-attention's context
    A       audio tokens
    D       model width
    N       attention heads
    K       width of one head
    C       channels

Pixels are `[B, T, H, W, 3]` in [-1, 1], latents `[B, F, h, w, 16]`, activations of the transformer
`[B, S, F, D]`: channels last, and space before frames (`fantasy_jax.sharding` gives the reason).

Signatures carry these shapes through jaxtyping. They are checked at run time in the tests, where
`tests/conftest.py` installs jaxtyping's import hook, and cost nothing elsewhere.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Float32, Int, Int16, UInt8, UInt16

DType = Any
"""Anything that `numpy.dtype` accepts, bfloat16 included."""

Leaf = Any
"""An array in a dataclass that is a pytree. JAX rebuilds those with other shapes (under `vmap`) and with
leaves that are no arrays (`None`), so that the type cannot be checked; the docstring gives the shape."""

__all__ = ["Array", "Bool", "DType", "Float", "Float32", "Int", "Int16", "Leaf", "UInt8", "UInt16"]
