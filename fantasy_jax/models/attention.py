"""One attention function for every network here."""

import jax
import jax.numpy as jnp

from fantasy_jax.typing import Array, Bool, Float, Int

_MASKED = -1e30
"""Score of a key that may not be seen. Finite, so that a query without any key gives a mean, not NaN."""


def attention(
    q: Float[Array, "B Q N K"],
    k: Float[Array, "B L N K"],
    v: Float[Array, "B L N K"],
    *,
    kv_lengths: Int[Array, " B"] | None = None,
    mask: Bool[Array, "#B #N #Q L"] | None = None,
    bias: Float[Array, "#B #N #Q L"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B Q N K"]:
    """Scaled dot-product attention; scores, softmax and its sums are float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        kv_lengths: How many keys, from the first, each sample has; the rest are padding and not seen.
        mask: True where a query may see a key.
        bias: Added to the scaled scores.
        scale: Factor on the scores; `1 / sqrt(K)` if None.

    Returns:
        Attended values, in the type of `v`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqnk,blnk->bnql", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += bias
    if kv_lengths is not None:
        seen = jnp.arange(k.shape[1]) < kv_lengths[:, None]
        scores = jnp.where(seen[:, None, None], scores, _MASKED)
    if mask is not None:
        scores = jnp.where(mask, scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnql,blnk->bqnk", weights.astype(v.dtype), v)
