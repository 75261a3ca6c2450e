"""What every network here is built from: norms in float32, and stacks of equal layers run as one.

Linear layers, norms and embeddings are Flax NNX's own; this file fixes the arguments in which PyTorch's
differ (`use_fast_variance`), and adds how layers are stacked and scanned.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)
Layers = TypeVar("Layers")
Carry = TypeVar("Carry")

# Statistics and the affine part are computed in float32 whatever the type of the input, as PyTorch's
# flash-attention era networks do; the mean of squares is not taken as E[x^2] - E[x]^2, which cancels.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False, dtype=jnp.float32)
RMSNorm = partial(nnx.RMSNorm, use_fast_variance=False, dtype=jnp.float32)


def stack_layers(make: Callable[[nnx.Rngs], Module], count: int, *, rngs: nnx.Rngs) -> Module:
    """Builds `count` equal layers as one module whose every parameter has a leading axis of that size."""

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
    saved_names: Sequence[str] | None = None,
) -> Carry:
    """Runs stacked layers one after another; forty layers are traced and compiled as one.

    Args:
        step: Applies one layer: `(layer, carry) -> carry`.
        layers: What `stack_layers` built, or any module (a tuple of modules, a dict) of such stacks.
        carry: What flows through the layers.
        saved_names: None keeps every activation for the backward pass. Otherwise activations are
            recomputed there, except those that `jax.ad_checkpoint.checkpoint_name` gave one of these names.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Carry, layer_state: nnx.State) -> tuple[Carry, None]:
        return step(nnx.merge(graphdef, layer_state), carry), None

    if saved_names is not None:
        policy = jax.checkpoint_policies.save_only_these_names(*saved_names)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, carry, state)[0]
