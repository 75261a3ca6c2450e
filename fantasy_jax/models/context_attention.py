"""Self-attention over tokens that are sharded along the `context` axis of the mesh, by one of two strategies.

`gather`: every device gathers all keys and values, and computes attention for its own queries. `all_to_all`:
every device receives all tokens of some of the heads (DeepSpeed-Ulysses, arXiv 2309.14509).

With c devices, and M bytes of queries in all of them (as many of keys, and of values), each device receives

                  forward         gradients       and stores, besides its own shard
    gather        2M (c-1)/c      2M (c-1)/c      2M
    all_to_all    4M (c-1)/c^2    4M (c-1)/c^2    4M/c

The forward column counts again where a block is rematerialised: for `gather` all of it, for `all_to_all` half
of it if the attended values are saved (`models.layers.Saved`).
"""

import functools
import logging

import jax
import jax.numpy as jnp

from fantasy_jax.errors import ConfigError
from fantasy_jax.models.attention import attention
from fantasy_jax.sharding import ContextParallelism, axis_size, partition
from fantasy_jax.typing import Array, Float

_MAX_GATHERED = 2 * 2**30
"""Most bytes of keys and values that `auto` gathers if it can avoid it. Differentiating a block takes as many
for gradients: together a quarter of the memory of a v5e chip, the smallest."""


def context_attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B L N K"],
    v: Float[Array, "B L N K"],
    *,
    kv_length: int | None = None,
    strategy: ContextParallelism = "auto",
) -> Float[Array, "B L N K"]:
    """Attention of all tokens to all tokens, sharded as `batch, space, heads, None`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        kv_length: Number of tokens before the padding; None if there is none.
        strategy: How devices exchange tokens; see `choose_strategy`.

    Raises:
        ConfigError: The strategy is `all_to_all`, and the `context` axis does not divide a device's heads.
    """
    if axis_size("context") == 1:
        return _attend(q, k, v, kv_length)
    batch, length, heads, width = q.shape
    batch //= axis_size("data") * axis_size("fsdp")
    heads //= axis_size("tensor")
    gathered = batch * length * heads * width * (k.dtype.itemsize + v.dtype.itemsize)
    strategy = choose_strategy(strategy, axis_size("context"), heads, gathered)
    _log(strategy, q.shape, axis_size("context"))
    spec = partition("batch", "space", "heads", None)

    @functools.partial(jax.shard_map, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    def run(q: Array, k: Array, v: Array) -> Array:
        return _STRATEGIES[strategy](q, k, v, kv_length)

    return run(q, k, v)


def choose_strategy(
    strategy: ContextParallelism, context: int, heads: int, gathered: int
) -> ContextParallelism:
    """The strategy of the config, or for `auto` the cheapest one that is possible.

    All-to-all moves 2/c of the bytes of gathering, but the `context` axis must divide the heads. On two
    devices both move the same bytes, and gathering takes half as many collectives.

    Args:
        strategy: Strategy of the config.
        context: Size c of the `context` axis.
        heads: Heads of one device.
        gathered: Bytes of the gathered keys and values of one device.

    Raises:
        ConfigError: The strategy is `all_to_all`, and `context` does not divide `heads`.
    """
    divisible = heads % context == 0
    if strategy == "all_to_all" and not divisible:
        raise ConfigError(
            f"context_parallelism: 'all_to_all' needs heads per device ({heads}) divisible by context "
            f"({context}); use 'gather' or another mesh"
        )
    if strategy != "auto":
        return strategy
    return "all_to_all" if divisible and (context > 2 or gathered > _MAX_GATHERED) else "gather"


@functools.cache
def _log(strategy: str, tokens: tuple[int, ...], context: int) -> None:
    logging.getLogger(__name__).info("self-attention of %s over context %d: %s", tokens, context, strategy)


def _attend(q: Array, k: Array, v: Array, kv_length: int | None) -> Array:
    lengths = None if kv_length is None else jnp.full(q.shape[0], kv_length)
    return attention(q, k, v, kv_lengths=lengths, name="self_attention")


def _gather(q: Array, k: Array, v: Array, kv_length: int | None) -> Array:
    k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
    return _attend(q, k, v, kv_length)


def _all_to_all(q: Array, k: Array, v: Array, kv_length: int | None) -> Array:
    exchange = functools.partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (exchange(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    return exchange(_attend(q, k, v, kv_length), split_axis=1, concat_axis=2)


_STRATEGIES = {"gather": _gather, "all_to_all": _all_to_all}
