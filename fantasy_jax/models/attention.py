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
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.sharding import AxisType

from fantasy_jax.errors import ConfigError
from fantasy_jax.models.splash import splash_attention
from fantasy_jax.sharding import divisible_partition, mesh_device
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
        run: Function of queries, keys, values, key lengths, scale, and the name of what it saves.
    """

    name: str
    platform: str
    supports: Callable[[Leaf, Leaf], bool]
    run: Callable[[Array, Array, Array, Array | None, float, str | None], Array]


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
    name: str | None = None,
) -> Float[Array, "B Q N K"]:
    """Scaled dot-product attention; scores and softmax are float32.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        kv_lengths: Number of keys of each sample; the keys after them are padding and are masked.
        bias: Bias of the scaled scores.
        scale: Factor of the scores; None for `1 / sqrt(K)`.
        name: Name under which `jax.checkpoint` can save the output and, with it, what else the backward pass
            of the backend needs, so that attention is not computed again (`models/layers.py`).

    Returns:
        The attention output, in the type of `v`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if bias is not None:
        return _xla(q, k, v, kv_lengths, scale, name, bias)
    return choose_backend(q, k).run(q, k, v, kv_lengths, scale, name)


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
    device = mesh_device()
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
    name: str | None = None,
    bias: Array | None = None,
) -> Array:
    attended = _attend(_scores(q, k, kv_lengths, scale, bias), v)
    return attended if name is None else checkpoint_name(attended, name)


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
    q: Array,
    k: Array,
    v: Array,
    kv_lengths: Array | None,
    scale: float,
    name: str | None = None,
    *,
    interpret: bool = False,
) -> Array:
    run = functools.partial(splash_attention, scale=scale, name=name, interpret=interpret)
    return _on_each_device(run, q, k, v, kv_lengths)


def _on_each_device(run: Callable, q: Array, k: Array, v: Array, kv_lengths: Array | None) -> Array:
    """Runs a kernel on every device, for the device's samples, queries and heads."""
    if set(jax.sharding.get_abstract_mesh().axis_types) <= {AxisType.Manual}:  # no mesh, or in a shard_map
        return run(q, k, v, kv_lengths)
    # The compiler can shard neither kernel. Dimensions that do not divide evenly are replicated.
    queries = divisible_partition(q.shape, "batch", "space", "heads", None)
    keys = divisible_partition(k.shape, "batch", None, "heads", None)
    lengths = None if kv_lengths is None else divisible_partition(kv_lengths.shape, "batch")
    specs = (queries, keys, keys, lengths)
    return jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, kv_lengths)


def _cudnn_supports(q: Leaf, k: Leaf) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and k.shape[1] >= _MIN_KEYS and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _cudnn(
    q: Array, k: Array, v: Array, kv_lengths: Array | None, scale: float, name: str | None = None
) -> Array:
    del name  # results of the kernel have none; policies recognise it
    return _on_each_device(functools.partial(_cudnn_local, scale=scale), q, k, v, kv_lengths)


def _cudnn_local(q: Array, k: Array, v: Array, kv_lengths: Array | None, *, scale: float) -> Array:
    lengths = (
        {}
        if kv_lengths is None
        else {
            "query_seq_lengths": jnp.full(q.shape[0], q.shape[1], jnp.int32),
            "key_value_seq_lengths": kv_lengths.astype(jnp.int32),
        }
    )
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **lengths)


def is_cudnn_forward(primitive: Primitive, *_: object, **__: object) -> bool:
    """Policy of `jax.checkpoint` that saves what cuDNN's forward kernel computes, which has no name."""
    return primitive.name.startswith("dot_product_attention_fwd")


def is_cudnn_self_attention(primitive: Primitive, *arguments: Leaf, **_: object) -> bool:
    """Policy that saves it for attention with at least as many keys as queries."""
    return is_cudnn_forward(primitive) and arguments[1].shape[1] >= arguments[0].shape[1]


BACKENDS = (
    Backend("splash", "tpu", _splash_supports, _splash),
    Backend("cudnn", "gpu", _cudnn_supports, _cudnn),
    Backend("xla", "any", lambda q, k: True, _xla),
)
"""Backends in order of preference."""
