"""Norms in float32, and stacks of equal layers under `jax.lax.scan`.

Linear layers, norms and embeddings are those of Flax NNX; this file sets the arguments whose defaults differ
from PyTorch (`use_fast_variance`), and adds stacking and scanning of layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

run = jax.jit(lambda network, *inputs: network(*inputs))
"""Runs a network as one compiled program. (`nnx.jit` would also return the parameters.)"""

Module = TypeVar("Module", bound=nnx.Module)
Layers = TypeVar("Layers")
Carry = TypeVar("Carry")

_STACKS = ("blocks", "layers")
"""Names of stacks of layers."""

# Statistics and the affine map are computed in float32 whatever the type of the input, as in the official
# code. The variance is not computed as E[x^2] - E[x]^2, which cancels.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False, dtype=jnp.float32)
RMSNorm = partial(nnx.RMSNorm, use_fast_variance=False, dtype=jnp.float32)


def stack_layers(make: Callable[[nnx.Rngs], Module], count: int, *, rngs: nnx.Rngs) -> Module:
    """Builds `count` equal layers as one module, whose parameters have a leading axis of that size."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> Module:
        return make(rngs)

    return build(rngs)


def is_stacked(path: str) -> bool:
    """Whether a parameter has an axis of layers, as those of `blocks/...`; a list's have an index there."""
    names = pairwise(path.split("/"))
    return any(name in _STACKS and not following.isdigit() for name, following in names)


def scan_layers(
    step: Callable[[Layers, Carry], Carry],
    layers: Layers,
    carry: Carry,
    *,
    remat_save_names: Sequence[str] | None = None,
) -> Carry:
    """Runs stacked layers one after another; the layers are traced and compiled once.

    Args:
        step: Applies one layer: `(layer, carry) -> carry`.
        layers: Module built by `stack_layers`, or a tree of such modules. Parameters in the host's memory
            (`sharding.to_host`) are copied to the device layer by layer.
        carry: Input of the first layer.
        remat_save_names: None saves every activation for the backward pass. Otherwise activations are
            rematerialised, except those that have one of these names (`jax.ad_checkpoint.checkpoint_name`).

    Returns:
        Output of the last layer.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Carry, layer_state: nnx.State) -> tuple[Carry, None]:
        return step(nnx.merge(graphdef, to_device(layer_state)), carry), None

    if remat_save_names is not None:
        policy = jax.checkpoint_policies.save_only_these_names(*remat_save_names)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, carry, state)[0]


def in_host(network: Module) -> Module:
    """An abstract network whose stacked parameters lie in the host's memory."""
    graphdef, state = nnx.split(network)
    flat = nnx.to_flat_state(state)
    for path, variable in flat:
        if is_stacked("/".join(map(str, path))):
            spec = variable.get_value()
            sharding = spec.sharding.with_memory_kind("pinned_host")
            variable.set_value(jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding))
    return nnx.merge(graphdef, state)


def to_device(state: nnx.State) -> nnx.State:
    """Copies what lies in the host's memory to the device, within a compiled program."""

    def copy(x: jax.Array) -> jax.Array:
        is_in_host = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if is_in_host else x

    return jax.tree.map(copy, state)
