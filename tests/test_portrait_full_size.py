"""FantasyPortrait at full size, without memory for weights: parameters, operations, largest arrays."""

import math
from pathlib import Path

import jax
import pytest

from fantasy_jax.config import build, load_config, section
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.performance.flops import inner_jaxprs
from fantasy_jax.performance.programs import guided_step_program, training_programs
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.sharding import MeshConfig, make_mesh
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import abstract_networks
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.video import VideoConfig

pytestmark = pytest.mark.networks

PATH = Path(__file__).parent.parent / "configs/fantasy_portrait_14b.py"
CONFIG = load_config(str(PATH))
VIDEO = VideoConfig(height=720, width=1280, num_frames=81, fps=25)
WINDOW = 97


@pytest.fixture(scope="module")
def networks():
    """All networks, without values."""
    mesh_config = MeshConfig(fsdp=1)
    mesh = make_mesh(**mesh_config.axes)
    with jax.set_mesh(mesh):
        yield abstract_networks(build(ModelConfig, CONFIG.model, "model"), mesh, mesh_config)


@pytest.fixture(scope="module")
def steps(networks):
    """Guided steps by number of people."""
    mesh = make_mesh(fsdp=1)
    config = build(PortraitSampleConfig, CONFIG.sample, "sample")
    return {n: guided_step_program(networks, config, VIDEO, mesh, people=n) for n in (1, 2, 3)}


def count(module):
    return sum(math.prod(x.shape) for x in flat_parameters(module).values())


def test_numbers_of_parameters(networks):
    adapter = networks["expression_adapter"]
    assert count(adapter.layers) == 838_860_800
    assert count(adapter.mouth) == 81_978_624
    assert count(adapter.emotion) == 81_346_304
    assert count(adapter.projections) + count(adapter.norm) == 1_138_688
    assert count(adapter) == 1_003_324_416
    # Wan2.1-I2V-14B's, and the adapter's.
    assert count(networks["transformer"]) == 16_394_878_784 + 1_003_324_416
    assert networks.config.motion_encoder.num_features == 554


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["adapters", "full"])
def test_the_training_step(variant):
    config = load_config(f"{PATH}:{variant}")
    train = section(StagesConfig, config, "train")
    stage = train.stages[0]
    assert (stage.dropout, stage.timesteps, stage.optimizer.learning_rate) == (0.2, "logit_normal", 1e-4)
    mesh, video = make_mesh(fsdp=1), section(VideoConfig, config, "video")
    with jax.set_mesh(mesh):
        model = section(ModelConfig, config, "model")
        one, two = (next(training_programs(model, train, video, mesh, people=n)) for n in (1, 2))
    state, _, batch, _ = two.arguments
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    assert trained == 1_003_324_416 + (16_394_878_784 if variant == "full" else 0)
    assert batch["expression"].shape == (stage.batch_size, 2, 81, 554)
    assert batch["labels"].shape == (stage.batch_size, 21, 45 * 45)
    assert "lips" not in batch
    assert 1 < two.flops / one.flops < 1.01


def arrays(jaxpr):
    """Shapes of everything that a program computes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in inner_jaxprs(equation):
            yield from arrays(inner)


def test_more_people_cost_little(steps):
    assert steps[1].name == "guided step, 2 branches"
    two, three = (steps[n].flops / steps[1].flops - 1 for n in (2, 3))
    assert 0 < two < 0.05
    assert three == pytest.approx(2 * two)


def test_scores_of_all_people_are_never_one_array(steps):
    """Of several people, those of one at a time are computed, and there is no mask of every token."""
    heads, space, frames = CONFIG.model.transformer.num_heads, VIDEO.tokens_per_frame, VIDEO.latent_frames
    for people, step in steps.items():
        shapes = set(arrays(jax.make_jaxpr(step.call)(*step.arguments).jaxpr))
        scores = [shape for shape in shapes if space in shape and WINDOW in shape]
        assert max(map(math.prod, scores)) == heads * space * frames * WINDOW
        if people > 1:
            assert not any(people * WINDOW in shape for shape in shapes)
            assert not any({people, WINDOW} < set(shape) for shape in scores)
