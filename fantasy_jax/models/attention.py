"""One attention function for every network here, over the kernels that machines have for it.

Kernels that never hold all scores are used where there are enough of them to matter: Pallas' splash
attention on TPUs, cuDNN's on NVIDIA GPUs. XLA's own matrix products are used everywhere else, and are what
the others are tested against.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.sharding import AxisType

from fantasy_jax.config import ConfigError
from fantasy_jax.sharding import partition
from fantasy_jax.typing import Array, Bool, Float, Int, Leaf

MASKED = -1e30
"""Score of a key that may not be seen. Finite, so that a query without any key gives a mean, not NaN."""

_FEW_KEYS = 128
"""With fewer, scores are no larger than what goes in and comes out."""


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Attributes:
        name: By which it is forced.
        platform: Where it runs.
        supports: Whether it can take these queries and keys; biases and masks only the plain one takes.
        run: Attends; of queries, keys, values, key lengths and scale.
    """

    name: str
    platform: str
    supports: Callable[[Leaf, Leaf], bool]
    run: Callable[[Array, Array, Array, Array | None, float], Array]


_forced: ContextVar[str | None] = ContextVar("attention backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend where it can be had, whatever machine this is: to compile for another, or to compare.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in (known := [backend.name for backend in BACKENDS]):
        raise ConfigError(f"attention: there is no backend {name!r}; use one of {', '.join(known)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


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
    if mask is not None or bias is not None:
        return _plain(q, k, v, kv_lengths, scale, mask, bias)
    return choose_backend(q, k).run(q, k, v, kv_lengths, scale)


def choose_backend(q: Leaf, k: Leaf) -> Backend:
    """The first backend that is forced, or at home on this machine, and can take these shapes."""
    platform, forced = jax.default_backend(), _forced.get()
    for backend in BACKENDS:
        wanted = backend.name == forced if forced else backend.platform in (platform, "any")
        if wanted and backend.supports(q, k):
            _log(backend.name, q.shape, k.shape)
            return backend
    return BACKENDS[-1]


@functools.cache
def _log(name: str, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    logging.getLogger(__name__).info("attention of %s to %s: %s", queries, keys, name)


def _plain(
    q: Array,
    k: Array,
    v: Array,
    kv_lengths: Array | None,
    scale: float,
    mask: Array | None = None,
    bias: Array | None = None,
) -> Array:
    scores = jnp.einsum("bqnk,blnk->bnql", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += bias
    if kv_lengths is not None:
        seen = jnp.arange(k.shape[1]) < kv_lengths[:, None]
        scores = jnp.where(seen[:, None, None], scores, MASKED)
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnql,blnk->bqnk", weights.astype(v.dtype), v)


def _splash_supports(q: Leaf, k: Leaf) -> bool:
    return k.shape[1] >= _FEW_KEYS and q.shape[-1] % 128 == 0


def _splash(
    q: Array, k: Array, v: Array, kv_lengths: Array | None, scale: float, *, interpret: bool = False
) -> Array:
    """Pallas' kernel, on every device for the samples, queries and heads that it has."""
    lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32) if kv_lengths is None else kv_lengths
    run = functools.partial(_splash_here, scale=scale, interpret=interpret)
    if set(jax.sharding.get_abstract_mesh().axis_types) <= {AxisType.Manual}:  # no mesh, or within its parts
        return run(q, k, v, lengths)
    queries, keys = partition("batch", "space", "heads", None), partition("batch", None, "heads", None)
    specs = (queries, keys, keys, partition("batch"))
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, lengths)


def _splash_here(q: Array, k: Array, v: Array, lengths: Array, *, scale: float, interpret: bool) -> Array:
    """Padding up to whole blocks is told from the rest by segment ids."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    block_q, block_kv = _block(queries), _block(keys)
    q, k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))
        for x, block in ((q * scale, block_q), (k, block_kv), (v, block_kv))
    )
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = splash_masks.MultiHeadMask([splash_masks.FullMask((q.shape[2], k.shape[2]))] * heads)
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def attend(q: Array, k: Array, v: Array, length: Array) -> Array:
        seen = (jnp.arange(k.shape[1]) < length).astype(jnp.int32)
        return kernel(q, k, v, splash.SegmentIds(jnp.ones(q.shape[1], jnp.int32), seen))

    return jax.vmap(attend)(q, k, v, lengths)[:, :, :queries].swapaxes(1, 2).astype(v.dtype)


def _block(length: int) -> int:
    """As long as the length, in whole 128s, but at most 512."""
    return min(512, -(-length // 128) * 128)


def _cudnn_supports(q: Leaf, k: Leaf) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and k.shape[1] >= _FEW_KEYS and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _cudnn(q: Array, k: Array, v: Array, kv_lengths: Array | None, scale: float) -> Array:
    lengths = (
        {}
        if kv_lengths is None
        else {
            "query_seq_lengths": jnp.full(q.shape[0], q.shape[1], jnp.int32),
            "key_value_seq_lengths": kv_lengths.astype(jnp.int32),
        }
    )
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **lengths)


BACKENDS = (
    Backend("splash", "tpu", _splash_supports, _splash),
    Backend("cudnn", "gpu", _cudnn_supports, _cudnn),
    Backend("splash_interpreted", "none", _splash_supports, functools.partial(_splash, interpret=True)),
    Backend("plain", "any", lambda q, k: True, _plain),
)
"""In the order in which they are asked; the interpreted one is for tests."""
