"""FantasyPortrait on a mesh: samples and gradients of one device, and no collective for the expression."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY_EXPRESSION, abstract, relative, tiny_transformer
from jax.sharding import NamedSharding, PartitionSpec
from test_sharding import (
    BATCH,
    CONFIG,
    CONTEXT_MESHES,
    FRAMES,
    MESHES,
    UNEVEN,
    collectives,
    draw,
    expected_collectives,
    model_inputs,
)

from fantasy_jax.diffusion.guidance import guidance_branches
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.models.adapters.expression import ExpressionAdapter
from fantasy_jax.sharding import batch_sharding, make_mesh, parameter_shardings
from fantasy_jax.system.conditioning import condition, velocity
from fantasy_jax.system.inputs import ClipInputs

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

SPACE = UNEVEN[0] * UNEVEN[1]  # 15 tokens, which are padded
GUIDANCE = guidance_branches(2, 5.0, 4.0, "expression")


def on_meshes(meshes):
    return pytest.mark.parametrize("sizes", meshes, ids=lambda sizes: "x".join(map(str, sizes.values())))


def make_transformer(width, heads):
    config = replace(TINY_EXPRESSION, width=width, num_heads=heads, num_layers=2)
    wan = replace(CONFIG, dim=width, num_heads=heads)
    return tiny_transformer(wan, expression=abstract(ExpressionAdapter, config))


@pytest.fixture(scope="module")
def transformer():
    return make_transformer(CONFIG.dim, CONFIG.num_heads)


@pytest.fixture(scope="module")
def wide_transformer():
    """A transformer with eight heads, one for each of eight devices."""
    return make_transformer(64, 8)


def clips(batch, people):
    """Latents and inputs of clips; labels also name a person without a driver, and owners are not sorted."""
    given = model_inputs(*UNEVEN, batch=batch)
    features = draw(batch, people, 4 * FRAMES - 3, TINY_EXPRESSION.feature_width, seed=5)
    text = given["text"]
    inputs = ClipInputs(given["first_frame"], text, 2 * text, given["image"], {"expression": features})
    if people > 1:
        labels = np.random.default_rng(6).integers(0, people + 2, (batch, FRAMES, SPACE))
        owners = jnp.tile(jnp.arange(people, 0, -1), (batch, 1))
        inputs = replace(inputs, labels=jnp.asarray(labels, jnp.int32), owners={"expression": owners})
    return given["latents"], inputs


def predict(model, latents, inputs):
    return velocity(model, latents, jnp.linspace(0.1, 0.9, len(latents)), condition(model, inputs))


@pytest.fixture(scope="module")
def sample_on_one_device(wide_transformer):
    config = SamplerConfig(num_inference_steps=2)
    return np.asarray(sample(wide_transformer, *clips(8, people=2), config, guidance=GUIDANCE))


@pytest.mark.slow
@on_meshes(MESHES)
def test_the_guided_sample_of_two_people(wide_transformer, sample_on_one_device, sizes):
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(wide_transformer)
        state = jax.device_put(state, parameter_shardings(state, mesh))
        noise, inputs = jax.device_put(clips(8, people=2), batch_sharding(mesh))
        config = SamplerConfig(num_inference_steps=2)
        result = sample(nnx.merge(graphdef, state), noise, inputs, config, guidance=GUIDANCE)
        assert relative(result, sample_on_one_device) < 1e-5


@pytest.mark.parametrize("people", [1, 3])
@pytest.mark.parametrize("strategy", ["gather", "all_to_all"])
@pytest.mark.parametrize("sizes", CONTEXT_MESHES, ids=str)
def test_a_block_communicates_for_self_attention_only(transformer, sizes, strategy, people):
    transformer.context_parallelism = strategy
    graphdef, state = nnx.split(transformer)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((state, *clips(BATCH, people)), NamedSharding(mesh, PartitionSpec()))
        run = jax.jit(lambda state, *clips: predict(nnx.merge(graphdef, state), *clips))
        program = run.lower(*arguments).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    assert collectives(program, bodies) == expected_collectives(strategy, SPACE + 1, mesh)


def gradients(model, mesh):
    """Loss, and its gradients by parameters and by motion features, with three people."""
    graphdef, state = nnx.split(model)
    latents, inputs = clips(8, people=3)
    target = draw(*latents.shape, seed=7)

    def loss(state, features, latents, inputs):
        inputs = replace(inputs, adapters={"expression": features})
        return jnp.mean((predict(nnx.merge(graphdef, state), latents, inputs) - target) ** 2)

    with jax.set_mesh(mesh):
        shardings = parameter_shardings(state, mesh), batch_sharding(mesh)
        given = jax.device_put((state, inputs.adapters["expression"]), shardings)
        clip = jax.device_put((latents, inputs), batch_sharding(mesh))
        run = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, shardings))
        value, found = run(*given, *clip)
    named = jax.tree.flatten_with_path(found)[0]
    return {"loss": value} | {jax.tree_util.keystr(path): leaf for path, leaf in named}


@pytest.fixture(scope="module")
def gradients_on_one_device(wide_transformer):
    return gradients(wide_transformer, make_mesh())


@pytest.mark.slow
@on_meshes([MESHES[2], *MESHES[4:]])  # that of context alone, and those of three axes
def test_gradients_through_masked_attention(wide_transformer, gradients_on_one_device, sizes):
    found = gradients(wide_transformer, make_mesh(**sizes))
    for name, expected in gradients_on_one_device.items():
        assert np.any(expected), name
        # On one device, the order of the samples alone changes these gradients by up to 2e-5.
        assert relative(found[name], expected) < 3e-5, name
