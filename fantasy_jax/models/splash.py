"""Splash attention, the Pallas kernel of JAX for TPUs, with blocks chosen by chip and length.

The forward kernel computes two products of queries and keys. The backward kernel computes five in one pass:
the scores again, and the gradients of values, weights, keys and queries. It writes a gradient of the queries
for each block of keys, in their type; these are then summed.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from fantasy_jax.sharding import mesh_device
from fantasy_jax.typing import Array, Float, Int

_LANES = 128
"""Blocks are multiples of this."""

_LARGEST_BLOCK = 1024
"""Largest block of queries, and of keys, that fits vector memory in libtpu's default division of it."""

_LARGER_BLOCKS = {"TPU v6 lite": 2048, "TPU7x": 2048}
"""The same for other chips, by `device_kind`. A v5p takes 2048 with a larger `xla_tpu_scoped_vmem_limit_kib`,
as in MaxDiffusion's `base_wan_14b.yml`."""


def splash_attention(
    q: Float[Array, "B Q N K"],
    k: Float[Array, "B L N K"],
    v: Float[Array, "B L N K"],
    kv_lengths: Int[Array, " B"] | None,
    *,
    scale: float,
    name: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B Q N K"]:
    """Attention on one device.

    Queries and keys are padded to whole blocks. Segment ids mask keys that are padding; where there are none,
    the kernel takes no segment ids.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        kv_lengths: Number of keys of each sample that are not padding; None: all.
        scale: Factor of the scores.
        name: Name of what the backward kernel needs, the output and the log-sum-exp of the scores, for
            `jax.checkpoint`.
        interpret: Whether XLA runs the kernel's operations, on any platform, as in tests.
    """
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    largest = _LARGER_BLOCKS.get(mesh_device().device_kind, _LARGEST_BLOCK)
    block_q = choose_block(queries, largest)
    block_kv = choose_block(keys, largest, halved=True)
    q, k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))
        for x, block in ((q * scale, block_q), (k, block_kv), (v, block_kv))
    )
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads)
    kernel = kernels.make_splash_mha(
        mask,
        block_sizes=_block_sizes(block_q, block_kv),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
        interpret=interpret,
    )

    def attend(q: Array, k: Array, v: Array, length: Array | None) -> Array:
        if length is None:
            return kernel(q, k, v)
        valid = (jnp.arange(k.shape[1]) < length).astype(jnp.int32)
        return kernel(q, k, v, kernels.SegmentIds(jnp.ones(q.shape[1], jnp.int32), valid))

    if kv_lengths is None and k.shape[2] > keys:
        kv_lengths = jnp.full(len(k), keys)
    return jax.vmap(attend)(q, k, v, kv_lengths)[:, :, :queries].swapaxes(1, 2).astype(v.dtype)


def choose_block(length: int, largest: int, *, halved: bool = False) -> int:
    """The block of a number of queries or keys.

    Up to the largest block that is one block. Otherwise it is the largest block, or half or three quarters of
    it: the one that needs least padding and, of several, the largest.

    Args:
        length: The number.
        largest: The largest block.
        halved: Whether half of a block of more than half of the largest one must be possible, too.
    """
    if length <= largest:
        step = 2 * _LANES if halved and length > largest // 2 else _LANES
        return -(-length // step) * step
    return min((largest, largest * 3 // 4, largest // 2), key=lambda block: -(-length // block) * block)


def _block_sizes(queries: int, keys: int) -> kernels.BlockSizes:
    """The same blocks forward and backward; a product takes half of a large block of keys."""
    compute = keys // 2 if keys > _LARGEST_BLOCK // 2 and keys % (2 * _LANES) == 0 else keys
    return kernels.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=compute,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
