"""Sounds of several people on a mesh: the velocity of one device, and no collective for the audio."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative
from jax.sharding import NamedSharding, PartitionSpec
from test_sharding import (
    AUDIO,
    BATCH,
    CONTEXT_MESHES,
    FRAMES,
    UNEVEN,
    collectives,
    draw,
    expected_collectives,
    make_transformer,
    sampler_inputs,
)

from fantasy_jax.sharding import make_mesh
from fantasy_jax.system.conditioning import condition, velocity

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

SPACE = UNEVEN[0] * UNEVEN[1]  # 15 tokens, which are padded


@pytest.fixture(scope="module")
def transformer():
    return make_transformer()


def clips(people):
    """Noise and inputs of clips; labels also name a person without a sound, and owners are not sorted."""
    noise, inputs = sampler_inputs(*UNEVEN, BATCH)
    labels = np.random.default_rng(6).integers(0, people + 2, (BATCH, FRAMES, SPACE))
    return noise, replace(
        inputs,
        adapters={"audio": draw(BATCH, people, 19, AUDIO.feature_width, seed=5)},
        labels=jnp.asarray(labels, jnp.int32),
        owners={"audio": jnp.tile(jnp.arange(people, 0, -1), (BATCH, 1))},
    )


def predict(model, noise, inputs):
    return velocity(model, noise, jnp.linspace(0.1, 0.9, BATCH), condition(model, inputs))


@pytest.mark.parametrize("people", [1, 2])
@pytest.mark.parametrize("sizes", CONTEXT_MESHES, ids=str)
def test_a_block_communicates_for_self_attention_only(transformer, sizes, people):
    transformer.context_parallelism = "gather"
    graphdef, state = nnx.split(transformer)
    given = clips(people)
    expected = nnx.jit(predict)(transformer, *given)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((state, *given), NamedSharding(mesh, PartitionSpec()))
        run = jax.jit(lambda state, *clips: predict(nnx.merge(graphdef, state), *clips))
        program = run.lower(*arguments).compile()
        found = program(*arguments)
    assert relative(found, expected) < 1e-5
    text = program.as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert collectives(text, bodies) == expected_collectives("gather", SPACE + 1, mesh)
