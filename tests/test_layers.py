"""Random generators for traced initial weights, and modules without memory for their parameters."""

import jax
import numpy as np
from flax import nnx

from fantasy_jax.models.layers import abstract, stack_layers, traced_rngs


class Network(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.stack = stack_layers(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 2, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)


def test_traced_generators_draw_the_numbers_of_flax():
    ours, flax = (nnx.state(Network(rngs=rngs)) for rngs in (traced_rngs(5), nnx.Rngs(5)))
    jax.tree.map(np.testing.assert_array_equal, ours, flax)


def test_abstract_modules_have_the_shapes_and_types_of_real_ones():
    found, real = abstract(lambda rngs: Network(rngs=rngs)), Network(rngs=nnx.Rngs(0))
    assert nnx.graphdef(found) == nnx.graphdef(real)
    specs, arrays = (jax.tree.leaves(nnx.state(module)) for module in (found, real))
    assert all(isinstance(spec, jax.ShapeDtypeStruct) for spec in specs)
    assert [(x.shape, x.dtype) for x in specs] == [(x.shape, x.dtype) for x in arrays]
