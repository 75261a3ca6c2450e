"""Norms in float32, and stacks of equal layers under `jax.lax.scan`.

Linear layers, norms and embeddings are those of Flax NNX; this file sets the arguments whose defaults differ
from PyTorch (`use_fast_variance`), and adds stacking and scanning of layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.typing import Array

run = jax.jit(lambda network, *inputs: network(*inputs))
"""Runs a network as one compiled program. (`nnx.jit` would also return the parameters.)"""

Module = TypeVar("Module", bound=nnx.Module)
Layers = TypeVar("Layers")
Carry = TypeVar("Carry")

# Statistics and the affine map are computed in float32 whatever the type of the input, as in the official
# code. The variance is not computed as E[x^2] - E[x]^2, which cancels.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False, dtype=jnp.float32)
RMSNorm = partial(nnx.RMSNorm, use_fast_variance=False, dtype=jnp.float32)


class _Stream(nnx.RngStream):
    """A random stream with the keys of `nnx.RngStream`, which is several times faster to trace.

    Where the counter is a tracer, `nnx.RngStream` asks it for its sharding, and JAX composes a long error
    message from all equations so far.
    """

    def __call__(self) -> Array:
        key = jax.random.fold_in(self.key[...], self.count[...])
        self.count.set_raw_value(self.count[...] + 1)
        return key


def traced_rngs(seed: int | Array = 0) -> nnx.Rngs:
    """The random generators of `nnx.Rngs(seed)`, for initial weights that are drawn in a traced function."""
    rngs = nnx.Rngs()
    rngs.default = _Stream(seed, tag="default")
    return rngs


def abstract(make: Callable[[nnx.Rngs], Module]) -> Module:
    """Builds a module with `jax.ShapeDtypeStruct`s as parameters.

    Args:
        make: Constructs the module with these random generators.
    """
    return nnx.eval_shape(lambda: make(traced_rngs()))


def stack_layers(make: Callable[[nnx.Rngs], Module], count: int, *, rngs: nnx.Rngs) -> Module:
    """Builds `count` equal layers as one module, whose parameters have a leading axis of that size."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> Module:
        return make(rngs)

    return build(rngs)


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
        layers: Module built by `stack_layers`, or a tree of such modules.
        carry: Input of the first layer.
        remat_save_names: None saves every activation for the backward pass. Otherwise activations are
            rematerialised, except those that have one of these names (`jax.ad_checkpoint.checkpoint_name`).

    Returns:
        Output of the last layer.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Carry, layer_state: nnx.State) -> tuple[Carry, None]:
        return step(nnx.merge(graphdef, layer_state), carry), None

    if remat_save_names is not None:
        policy = jax.checkpoint_policies.save_only_these_names(*remat_save_names)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, carry, state)[0]
