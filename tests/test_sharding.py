"""The transformer cut over devices: what it exchanges, and that it computes the same."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise, relative
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.sharding import axis_size, constrain, make_mesh

CONFIG = WanConfig(
    dim=48, ffn_dim=80, frequency_dim=16, text_dim=20, text_length=8, image_dim=24, num_heads=4, num_layers=2
)
AUDIO = AudioAdapterConfig(feature_width=12, token_width=28, width=48, num_heads=4, num_layers=2)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
FRAMES = 3


@pytest.fixture(scope="module")
def transformer():
    adapter = AudioAdapter(AUDIO, rngs=nnx.Rngs(1))
    return randomise(WanTransformer(CONFIG, adapters={"audio": adapter}, rngs=nnx.Rngs(0)))


def inputs(rows, columns):
    shapes = (
        (2, FRAMES, rows, columns, 16),
        (2, FRAMES, rows, columns, 20),
        (2, 5, 20),
        (2, 7, 24),
        (2, 23, 12),
    )
    drawn = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    return (*drawn[:2], jnp.array([900.5, 20.25]), *drawn[2:])


def forward(graphdef):
    @jax.jit
    def run(state, latents, first_frame, timestep, text, image, audio):
        model = nnx.merge(graphdef, state)
        conditions = model.conditions(text, image)
        conditions["audio"] = model.adapters["audio"].frame_level(audio, 4 * (FRAMES - 1) + 1)
        return model(latents, first_frame, timestep, conditions)

    return run


def collectives(program: str) -> list[tuple[str, str, str]]:
    """Kind, shape and origin of each exchange in a compiled program."""
    found = []
    for line in program.splitlines():
        if match := re.search(rf"= (\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line):
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append((match[2], match[1], origin[1] if origin else ""))
    return found


# 8 x 16 latents are 32 tokens of space, 6 x 10 are 15, which no axis of 4 or 2 divides.
@pytest.mark.parametrize("size", [(8, 16), (6, 10)])
@pytest.mark.parametrize(
    "mesh_sizes", [{"context": 4}, {"context": 4, "data": 2}, {"context": 2, "tensor": 2}]
)
def test_equals_one_device_and_gathers_only_keys_and_values(transformer, size, mesh_sizes):
    graphdef, state = nnx.split(transformer)
    arguments = inputs(*size)
    expected = np.asarray(forward(graphdef)(state, *arguments))
    mesh = make_mesh(**mesh_sizes)
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        state, arguments = jax.device_put((state, arguments), everywhere)
        run = forward(graphdef)
        assert relative(run(state, *arguments), expected) < 2e-6
        found = collectives(run.lower(state, *arguments).compile().as_text())

    in_block = [(kind, shape) for kind, shape, origin in found if "while/body" in origin]
    gathered = [shape for kind, shape in in_block if kind == "all-gather"]
    assert len(gathered) == 2, in_block
    space = -(-size[0] * size[1] // 4 // mesh_sizes["context"]) * mesh_sizes["context"]
    heads = CONFIG.num_heads // mesh_sizes.get("tensor", 1)
    elements = 2 // mesh_sizes.get("data", 1) * space * FRAMES * heads * (CONFIG.dim // CONFIG.num_heads)
    for shape in gathered:  # each is keys or values of all space, and as large as that
        assert np.prod([int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",")]) == elements
    others = [kind for kind, _ in in_block if kind != "all-gather"]
    # Cutting heads makes the output projections sums over devices; cutting space adds nothing.
    assert set(others) <= ({"all-reduce"} if "tensor" in mesh_sizes else set())


@pytest.mark.networks
def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", None) is x
    assert axis_size("context") == 1
