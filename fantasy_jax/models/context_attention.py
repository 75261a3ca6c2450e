"""Self-attention of tokens that lie on several devices, those of the mesh's `context` axis, in three ways.

`gather`: every device gets all keys and values, and attends with its own queries. `all_to_all`: every device
gets all tokens, but of a part of the heads (DeepSpeed-Ulysses, arXiv 2309.14509). `ring`: keys and values go
around, and every device adds up what its queries hear of each part (Ring Attention, arXiv 2310.01889).

With c devices, and M the bytes of all their queries (of keys, and of values, as many), a device is sent

                  forward         of gradients              and holds, beside its own part
    gather        2M (c-1)/c      2M (c-1)/c                2M
    all_to_all    4M (c-1)/c^2    4M (c-1)/c^2              4M/c
    ring          2M (c-1)/c      up to 4M, as it adds up   4M/c
                                  in float32, and keys
                                  and values once more

and what is sent forward, twice, where a block is computed anew for the backward pass. The first two attend
by any backend of `attention`. The ring needs the logarithms of the softmax's sums, which those do not give;
it is written out in matrix products, whose scores pass through memory, and is the slowest where all fit.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from fantasy_jax.config import ConfigError
from fantasy_jax.models.attention import MASKED, attention
from fantasy_jax.sharding import ContextParallelism, axis_size, partition
from fantasy_jax.typing import Array, Bool, Float, Int

_GATHERED = 2 * 2**30
"""Bytes of keys and values that are gathered rather than sent around. While a block is differentiated there
are as many of gradients: together a quarter of the smallest chip's memory, v5e's."""

_QUERIES = 256
"""That the ring attends with at once, so that scores take a few hundred megabytes."""

_Arrays = tuple[Array, ...]
_Turn = Int[Array, ""] | int


def context_attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B L N K"],
    v: Float[Array, "B L N K"],
    *,
    kv_length: int | None = None,
    way: ContextParallelism = "auto",
) -> Float[Array, "B L N K"]:
    """Attention of all tokens to each other, wherever they lie; they are cut as `batch, space, heads, None`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        kv_length: How many tokens, from the first, are no padding; None: all.
        way: How devices exchange them.

    Raises:
        ConfigError: The heads of a device cannot be shared by those of the context axis, and must be.
    """
    if axis_size("context") == 1:
        return _attend(q, k, v, kv_length)
    batch, length, heads, width = q.shape
    batch //= axis_size("data") * axis_size("fsdp")
    heads //= axis_size("tensor")
    gathered = batch * length * heads * width * (k.dtype.itemsize + v.dtype.itemsize)
    way = choose_way(way, axis_size("context"), heads, gathered)
    _log(way, q.shape, axis_size("context"))
    cut = partition("batch", "space", "heads", None)

    @functools.partial(jax.shard_map, in_specs=(cut, cut, cut), out_specs=cut, check_vma=False)
    def run(q: Array, k: Array, v: Array) -> Array:
        return _WAYS[way](q, k, v, kv_length)

    return run(q, k, v)


def choose_way(way: ContextParallelism, context: int, heads: int, gathered: int) -> ContextParallelism:
    """The way that is asked for, or the one that sends least and fits.

    All-to-all, where heads can be shared, sends 2/c of what the others send. Two devices send the same either
    way, and gathering does it in half as many exchanges. Where heads cannot be shared, gathered keys and
    values let fast kernels attend; the ring is for those that would fill the memory.

    Args:
        way: That is asked for.
        context: Devices that share a clip, c.
        heads: Of one device, before they are shared.
        gathered: Bytes of keys and values of a device's clips and heads, all tokens.

    Raises:
        ConfigError: Heads cannot be shared, and must be.
    """
    if way == "all_to_all" and heads % context:
        raise ConfigError(
            f"context_parallelism is 'all_to_all', but the {heads} heads of a device cannot be shared by "
            f"context {context}; use 'gather' or 'ring', or another mesh"
        )
    if way != "auto":
        return way
    if heads % context == 0 and (context > 2 or gathered > _GATHERED):
        return "all_to_all"
    return "gather" if gathered <= _GATHERED else "ring"


@functools.cache
def _log(way: str, tokens: tuple[int, ...], context: int) -> None:
    logging.getLogger(__name__).info("self-attention of %s over context %d: %s", tokens, context, way)


def _attend(q: Array, k: Array, v: Array, kv_length: int | None) -> Array:
    lengths = None if kv_length is None else jnp.full(q.shape[0], kv_length)
    return attention(q, k, v, kv_lengths=lengths)


def _by_gathering(q: Array, k: Array, v: Array, kv_length: int | None) -> Array:
    k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
    return _attend(q, k, v, kv_length)


def _by_all_to_all(q: Array, k: Array, v: Array, kv_length: int | None) -> Array:
    exchange = functools.partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    return exchange(_attend(q, k, v, kv_length), split_axis=1, concat_axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_ring(
    q: Float[Array, "B P N K"], k: Float[Array, "B P N K"], v: Float[Array, "B P N K"], kv_length: int | None
) -> Float[Array, "B P N K"]:
    return _ring_forward(q, k, v, kv_length)[0]


def _ring_forward(q: Array, k: Array, v: Array, kv_length: int | None) -> tuple[Array, _Arrays]:
    """What queries hear; and what the backward pass needs: that, and the logarithms of the softmax's sums."""
    queries, last = _in_parts(q), axis_size("context") - 1
    heard = jnp.zeros(queries.shape, jnp.float32), jnp.full(queries.shape[:-1], -jnp.inf)

    def listen(keys: _Arrays, heard: _Arrays, turn: _Turn) -> _Arrays:
        """Adds what all queries hear of the keys that are here now."""
        seen = _seen(k, turn, kv_length)
        return jax.lax.map(lambda part: _hear(*part, *keys, seen), (queries, *heard))

    def step(carry: tuple[_Arrays, _Arrays], turn: _Turn) -> tuple[tuple[_Arrays, _Arrays], None]:
        keys, heard = carry
        return (_pass_on(keys), listen(keys, heard, turn)), None

    (keys, heard), _ = jax.lax.scan(step, ((k, v), heard), jnp.arange(last))
    values, sums = (_whole(x, q.shape[1]) for x in listen(keys, heard, last))
    values = values.astype(v.dtype)
    return values, (q, k, v, values, sums)


def _ring_backward(kv_length: int | None, residuals: _Arrays, gradient: Array) -> _Arrays:
    """Keys and values go around once more, and their gradients with them."""
    q, k, v, heard, sums = residuals
    # The mean of the gradient over each row of weights follows from what was heard (FlashAttention-2, arXiv
    # 2307.08691, algorithm 2).
    means = (gradient.astype(jnp.float32) * heard).sum(axis=-1)
    parts, last = tuple(map(_in_parts, (q, sums, gradient, means))), axis_size("context") - 1
    of_queries, of_keys = (jnp.zeros(x.shape, jnp.float32) for x in (parts[0], k))

    def learn(keys: _Arrays, of_keys: _Arrays, of_queries: Array, turn: _Turn) -> tuple[_Arrays, Array]:
        """Adds the gradients that arise between all queries and the keys that are here now."""
        seen = _seen(k, turn, kv_length)

        def learn_part(of_keys: _Arrays, part: _Arrays) -> tuple[_Arrays, Array]:
            *part, of_queries = part
            more, of_keys_here = _gradients(*part, *keys, seen)
            return jax.tree.map(jnp.add, of_keys, of_keys_here), of_queries + more

        return jax.lax.scan(learn_part, of_keys, (*parts, of_queries))

    def step(carry: tuple, turn: _Turn) -> tuple[tuple, None]:
        keys, of_keys, of_queries = carry
        of_keys, of_queries = learn(keys, of_keys, of_queries, turn)
        return (_pass_on(keys), _pass_on(of_keys), of_queries), None

    carry, _ = jax.lax.scan(step, ((k, v), (of_keys, of_keys), of_queries), jnp.arange(last))
    of_keys, of_queries = learn(*carry, last)
    of_k, of_v = _pass_on(tuple(x.astype(k.dtype) for x in of_keys))  # one step further they are at home
    return _whole(of_queries, q.shape[1]).astype(q.dtype), of_k, of_v


_by_ring.defvjp(_ring_forward, _ring_backward)


def _hear(
    q: Float[Array, "B Q N K"],
    heard: Float[Array, "B Q N K"],
    sums: Float[Array, "B Q N"],
    k: Float[Array, "B P N K"],
    v: Float[Array, "B P N K"],
    seen: Bool[Array, " P"] | None,
) -> tuple[Float[Array, "B Q N K"], Float[Array, "B Q N"]]:
    """What queries have heard of all keys up to these, and the logarithms of the softmax's sums."""
    scores = _scores(q, k, seen)
    total = jnp.logaddexp(sums, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2))
    weights = jnp.exp(scores - total.swapaxes(1, 2)[..., None]).astype(v.dtype)
    new = jnp.einsum("bnql,blnk->bqnk", weights, v, preferred_element_type=jnp.float32)
    return heard * jnp.exp(sums - total)[..., None] + new, total


def _gradients(
    q: Float[Array, "B Q N K"],
    sums: Float[Array, "B Q N"],
    gradient: Float[Array, "B Q N K"],
    means: Float[Array, "B Q N"],
    k: Float[Array, "B P N K"],
    v: Float[Array, "B P N K"],
    seen: Bool[Array, " P"] | None,
) -> tuple[Float[Array, "B Q N K"], tuple[Float[Array, "B P N K"], Float[Array, "B P N K"]]]:
    """Of these queries, and of these keys and values."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    sums, means = (x.swapaxes(1, 2)[..., None] for x in (sums, means))
    weights = jnp.exp(_scores(q, k, seen) - sums)
    of_weights = product("bqnk,blnk->bnql", gradient, v)
    of_scores = (weights * (of_weights - means) * q.shape[-1] ** -0.5).astype(q.dtype)
    of_values = product("bnql,bqnk->blnk", weights.astype(v.dtype), gradient)
    of_keys = product("bnql,bqnk->blnk", of_scores, q)
    return product("bnql,blnk->bqnk", of_scores, k), (of_keys, of_values)


def _scores(q: Array, k: Array, seen: Array | None) -> Float[Array, "B N Q P"]:
    scores = jnp.einsum("bqnk,blnk->bnql", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return scores if seen is None else jnp.where(seen, scores, MASKED)


def _seen(k: Array, turn: _Turn, kv_length: int | None) -> Bool[Array, " P"] | None:
    """Which of the keys that are here after some turns are no padding."""
    if kv_length is None:
        return None
    owner = (jax.lax.axis_index("context") - turn) % axis_size("context")
    return owner * k.shape[1] + jnp.arange(k.shape[1]) < kv_length


def _pass_on(tree: _Arrays) -> _Arrays:
    """To the next device of the ring."""
    count = axis_size("context")
    pairs = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", pairs), tree)


def _in_parts(x: Float[Array, "B P ..."]) -> Float[Array, "parts B Q ..."]:
    """Tokens in parts of nearly `_QUERIES`, zeros behind them."""
    batch, length, *rest = x.shape
    count = -(-length // _QUERIES)
    x = jnp.pad(x, ((0, 0), (0, -length % count), *[(0, 0)] * len(rest)))
    return jnp.moveaxis(x.reshape(batch, count, -1, *rest), 1, 0)


def _whole(parts: Float[Array, "parts B Q ..."], length: int) -> Float[Array, "B P ..."]:
    """The reverse of `_in_parts`."""
    x = jnp.moveaxis(parts, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


_WAYS = {"gather": _by_gathering, "all_to_all": _by_all_to_all, "ring": _by_ring}
