"""Norms in float32, and stacks of equal layers under `jax.lax.scan`.

Linear layers, norms and embeddings are those of Flax NNX; this file sets the arguments whose defaults differ
from PyTorch (`use_fast_variance`), and adds stacking and scanning of layers.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.models.attention import is_cudnn_forward, is_cudnn_self_attention
from fantasy_jax.typing import Array

Saved = tuple[Literal["self_attention", "cross_attention", "mlp", "products"], ...] | None
"""What each layer of a stack saves for the backward pass, which computes the rest again; None: everything.

- `self_attention`: the attended values of self-attention, before the output projection, and the log-sum-exp
  of the scores, so that the backward pass does not run the forward kernel.
- `cross_attention`: the output of cross-attention, after the output projection.
- `mlp`: the output of the MLP. The backward pass needs it for the gradient of the gate alone.
- `products`: the results of all linear layers and of all attention, so that no forward product runs twice.

Each of the first three is as large as the layer's input, in the type of the matrix products: 8.2 GiB for a
clip of 21,504 tokens in the 14B transformer. `products` is 14 times as large, with text, image and audio. The
devices that share a clip share it.
"""

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


def is_stacked(path: str) -> bool:
    """Whether a parameter has an axis of layers, as those of `blocks/...`; a list's have an index there."""
    names = pairwise(path.split("/"))
    return any(name in _STACKS and not following.isdigit() for name, following in names)


def is_stacked_matrix(path: str) -> bool:
    """Whether a parameter holds the matrix of a linear layer for each layer of a stack.

    These are what the host's memory can hold: the others are small, and libtpu of JAX 0.10 does not compile
    slices of the tiles that they have there.
    """
    return is_stacked(path) and path.endswith(("/kernel", "/weight"))


def scan_layers(
    step: Callable[[Layers, Carry], Carry],
    layers: Layers,
    carry: Carry,
    *,
    remat_save_names: Saved = None,
) -> Carry:
    """Runs stacked layers one after another; the layers are traced and compiled once.

    Args:
        step: Applies one layer: `(layer, carry) -> carry`.
        layers: Module built by `stack_layers`, or a tree of such modules. Parameters in the host's memory
            (`sharding.to_host`) are copied to the device layer by layer.
        carry: Input of the first layer.
        remat_save_names: Activations that are saved for the backward pass.

    Returns:
        Output of the last layer.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Carry, layer_state: nnx.State) -> tuple[Carry, None]:
        return step(nnx.merge(graphdef, to_device(layer_state)), carry), None

    if remat_save_names is not None:
        body = jax.checkpoint(body, policy=_remat_policy(remat_save_names), prevent_cse=False)
    return jax.lax.scan(body, carry, state)[0]


def _remat_policy(names: tuple[str, ...]) -> Callable[..., Any]:
    saveable = jax.checkpoint_policies
    policies = [saveable.save_only_these_names(*names)]
    if "self_attention" in names:
        policies.append(is_cudnn_self_attention)
    if "products" in names:
        named = saveable.save_only_these_names("self_attention")
        policies += [saveable.dots_with_no_batch_dims_saveable, named, is_cudnn_forward]
    return reduce(saveable.save_from_both_policies, policies)


def in_host(network: Module) -> Module:
    """An abstract network whose stacked matrices lie in the host's memory."""
    graphdef, state = nnx.split(network)
    flat = nnx.to_flat_state(state)
    for path, variable in flat:
        if is_stacked_matrix("/".join(map(str, path))):
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
