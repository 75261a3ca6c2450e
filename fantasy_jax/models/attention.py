"""Scaled dot-product attention for all networks, with a backend for each platform.

TPUs run the splash attention kernel of Pallas, NVIDIA GPUs the attention of cuDNN; neither stores the scores.
On other platforms, and for shapes that a kernel does not support, XLA computes matrix products; that backend
is the reference in the tests of the others.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.sharding import AxisType

from fantasy_jax.errors import ConfigError
from fantasy_jax.sharding import partition
from fantasy_jax.typing import Array, Bool, Float, Int, Leaf

MASK_VALUE = -1e30
"""Score of a masked key. It is finite: a query whose keys are all masked gets the values' mean, not NaN."""

_MIN_KEYS = 128
"""Fewest keys for which a kernel is used. With fewer, scores are no larger than inputs and outputs."""

_forced_backend = jax.make_user_context(None)  # part of the cache key of `jax.jit`, unlike a `ContextVar`


@dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    Attributes:
        name: Name for `use_backend` and for the log.
        platform: Platform of the devices on which it runs, or "any".
        supports: Whether it supports these queries and keys. Only the XLA backend takes biases.
        run: Function of queries, keys, values, key lengths and scale.
    """

    name: str
    platform: str
    supports: Callable[[Leaf, Leaf], bool]
    run: Callable[[Array, Array, Array, Array | None, float], Array]


def use_backend(name: str) -> AbstractContextManager:
    """Context in which `attention` uses this backend on any platform, for shapes that it supports.

    Raises:
        ConfigError: There is no backend of this name.
    """
    if name not in (known := [backend.name for backend in BACKENDS]):
        raise ConfigError(f"attention: there is no backend {name!r}; use one of {', '.join(known)}")
    return _forced_backend(name)


def attention(
    q: Float[Array, "B Q N K"],
    k: Float[Array, "B L N K"],
    v: Float[Array, "B L N K"],
    *,
    kv_lengths: Int[Array, " B"] | None = None,
    bias: Float[Array, "#B #N #Q L"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B Q N K"]:
    """Scaled dot-product attention; scores and softmax are float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        kv_lengths: Number of keys of each sample; the keys after them are padding and are masked.
        bias: Bias of the scaled scores.
        scale: Factor of the scores; None for `1 / sqrt(K)`.

    Returns:
        The attention output, in the type of `v`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        return _xla(q, k, v, kv_lengths, scale, bias)
    return choose_backend(q, k).run(q, k, v, kv_lengths, scale)


def multi_head_attention(
    q: Float[Array, "B Q D"], k: Float[Array, "B L D"], v: Float[Array, "B L D"], num_heads: int
) -> Float[Array, "B Q D"]:
    """Attention with `num_heads` heads; splits the last axis into heads, and merges them again."""
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q, k, v))
    return attention(q, k, v).reshape(*q.shape[:2], -1)


def grouped_attention(
    q: Float[Array, "B Q N K"],
    k: Float[Array, "B P L N K"],
    v: Float[Array, "B P L N K"],
    *,
    kv_lengths: Int[Array, " B"] | None = None,
    mask: Bool[Array, "B Q P"] | None = None,
) -> Float[Array, "B Q N K"]:
    """Attention to groups of keys, such as one group for each person; a query attends to some of the groups.

    Equal to attention to the concatenated groups with a mask of every key. Groups are computed one after
    another and combined by the log-sum-exp of their scores, so that no array has the shape `[Q, P L]`, and
    the mask has one value for each group. XLA computes the products, as it does for a single group of so few
    keys.

    Args:
        q: Queries.
        k: Keys of P groups.
        v: Values of P groups.
        kv_lengths: Number of keys of each sample that are not padding, the same in all groups.
        mask: True where a query attends to a group; None: each attends to all.

    Returns:
        The attention output, in the type of `v`; exactly zero for a query that attends to no group.
    """
    scale = q.shape[-1] ** -0.5
    groups = [_xla_with_lse(q, k[:, i], v[:, i], kv_lengths, scale) for i in range(k.shape[1])]
    totals = jnp.stack([total for _, total in groups], axis=-1)
    if mask is not None:
        totals = jnp.where(mask[:, None], totals, MASK_VALUE)
    weights = jax.nn.softmax(totals, axis=-1)
    if mask is not None:
        weights = jnp.where(mask[:, None], weights, 0)
    weights = weights.swapaxes(1, 2)[..., None]
    return sum(weights[:, :, :, i] * attended for i, (attended, _) in enumerate(groups)).astype(v.dtype)


def choose_backend(q: Leaf, k: Leaf) -> Backend:
    """The backend that is forced or of the platform, if it supports these shapes; otherwise the XLA one."""
    platform, forced = _platform(), _forced_backend.value
    for backend in BACKENDS:
        wanted = backend.name == forced if forced else backend.platform in (platform, "any")
        if wanted and backend.supports(q, k):
            _log(backend.name, q.shape, k.shape)
            return backend
    return BACKENDS[-1]


def _platform() -> str:
    """Platform of the mesh in force, whose devices need not be attached; JAX's default without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    if hasattr(device, "platform"):
        return device.platform
    kind = device.device_kind  # JAX 0.10.0 has no `platform`
    return "tpu" if kind.startswith("TPU") else "cpu" if kind == "cpu" else "gpu"


@functools.cache
def _log(name: str, queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
    logging.getLogger(__name__).info("attention of %s to %s: %s", queries, keys, name)


def _xla(
    q: Array,
    k: Array,
    v: Array,
    kv_lengths: Array | None,
    scale: float,
    bias: Array | None = None,
) -> Array:
    return _attend(_scores(q, k, kv_lengths, scale, bias), v)


def _xla_with_lse(
    q: Array, k: Array, v: Array, kv_lengths: Array | None, scale: float
) -> tuple[Array, Array]:
    """The attention output, and the log-sum-exp of the scores, `[B, N, Q]`."""
    scores = _scores(q, k, kv_lengths, scale)
    return _attend(scores, v), jax.nn.logsumexp(scores, axis=-1)


def _attend(scores: Array, v: Array) -> Array:
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnql,blnk->bqnk", weights.astype(v.dtype), v)


def _scores(
    q: Array,
    k: Array,
    kv_lengths: Array | None,
    scale: float,
    bias: Array | None = None,
) -> Array:
    scores = jnp.einsum("bqnk,blnk->bnql", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += bias
    if kv_lengths is not None:
        valid = jnp.arange(k.shape[1]) < kv_lengths[:, None]
        scores = jnp.where(valid[:, None, None], scores, MASK_VALUE)
    return scores


def _splash_supports(q: Leaf, k: Leaf) -> bool:
    return k.shape[1] >= _MIN_KEYS and q.shape[-1] % 128 == 0


def _splash(
    q: Array, k: Array, v: Array, kv_lengths: Array | None, scale: float, *, interpret: bool = False
) -> Array:
    """Runs the Pallas kernel on every device, for the device's samples, queries and heads."""
    lengths = jnp.full(q.shape[0], k.shape[1], jnp.int32) if kv_lengths is None else kv_lengths
    run = functools.partial(_splash_local, scale=scale, interpret=interpret)
    if set(jax.sharding.get_abstract_mesh().axis_types) <= {AxisType.Manual}:  # no mesh, or in a shard_map
        return run(q, k, v, lengths)
    queries, keys = partition("batch", "space", "heads", None), partition("batch", None, "heads", None)
    specs = (queries, keys, keys, partition("batch"))
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, lengths)


def _splash_local(q: Array, k: Array, v: Array, lengths: Array, *, scale: float, interpret: bool) -> Array:
    """Pads to whole blocks; segment ids mask the padding."""
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
        valid = (jnp.arange(k.shape[1]) < length).astype(jnp.int32)
        return kernel(q, k, v, splash.SegmentIds(jnp.ones(q.shape[1], jnp.int32), valid))

    return jax.vmap(attend)(q, k, v, lengths)[:, :, :queries].swapaxes(1, 2).astype(v.dtype)


def _block(length: int) -> int:
    """Length of a block: the length rounded up to a multiple of 128, at most 512."""
    return min(512, -(-length // 128) * 128)


def _cudnn_supports(q: Leaf, k: Leaf) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and k.shape[1] >= _MIN_KEYS and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


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
    Backend("xla", "any", lambda q, k: True, _xla),
)
"""Backends in order of preference."""
