"""The memory that settings of sampling need, and the GPUs that have it."""

import json

import jax
import pytest
from flax import nnx
from helpers import abstract

from fantasy_jax.config import load_config, section
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.performance import memory
from fantasy_jax.performance.chips import GIB
from fantasy_jax.performance.program import Program
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.video import VideoConfig

CONFIG = "configs/fantasy_talking_14b.py:debug"


def guided_step(found):
    return next(stage for stage in found if stage["name"].startswith("guided step"))


def test_the_table_says_which_gpus_have_enough():
    step = memory.Stage("guided step, 2 branches", 17 * GIB, 4 * GIB, 3 * GIB)
    gated = memory.Stage("guided step, 1 branch", 17 * GIB, 2 * GIB, 3 * GIB)
    other = memory.Stage("text encoder", 23 * GIB, GIB // 2, 0)
    *_, row = memory.stage_table({"x": [other, gated, step]}).splitlines()
    assert row == "| x | 17.0 + 4.0 | 23.5, text encoder | 23.5 | 3.0 | no | yes | yes | yes | yes |"


def test_results_that_reuse_memory_are_not_counted():
    step = jax.jit(lambda x, y: (x + y, y[:2] * 2.0), donate_argnums=0)
    array = jax.ShapeDtypeStruct((8,), "float32")
    assert memory._new_results(step.lower(array, array)) == 8


def test_a_program_that_does_not_fit_says_what_it_needs(monkeypatch):
    def fail(lowered):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.50G of 16.00G hbm.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    array = jax.ShapeDtypeStruct((2**28,), "float32")
    program = Program("double", jax.jit(lambda x: x + x).lower, (array,), 0, 0, print)
    assert memory._compiled_temporaries(program, program.lower(array)) == 19.5 * GIB


def quantised_sizes():
    """Numbers of the weights of the blocks' kernels, and of their outputs, each of which has a scale."""
    transformer = abstract(WanTransformer, section(ModelConfig, load_config(CONFIG), "model").transformer)
    modules = nnx.iter_modules(transformer.blocks)
    kernels = [module.kernel for _, module in modules if type(module) is nnx.Linear]
    return sum(kernel.size for kernel in kernels), sum(kernel.size // kernel.shape[-2] for kernel in kernels)


@pytest.mark.slow
def test_memory_is_counted_for_every_choice_of_settings(tmp_path, capsys):
    assert memory.main([f"--config={CONFIG}", "--seconds=1", f"--json={tmp_path / 'x.json'}"]) == 0
    assert capsys.readouterr().out.count(" yes | yes | yes | yes | yes |") == len(memory.CHOICES)
    exact, eight_bit, host, both = map(guided_step, json.loads((tmp_path / "x.json").read_text()).values())
    weights, scales = quantised_sizes()  # float32 weights become 8 bits and float32 scales
    assert exact["arguments"] - eight_bit["arguments"] == 3 * weights - 4 * scales
    for before, after in ((exact, host), (eight_bit, both)):
        assert after["arguments"] + after["host"] == before["arguments"]
        assert after["temporaries"] > before["temporaries"]
    assert host["host"] - both["host"] == 3 * weights  # the scales are on the device


@pytest.mark.slow
def test_temporaries_are_those_of_the_compiler_of_a_device():
    config = load_config(CONFIG)
    model, video = section(ModelConfig, config, "model"), section(VideoConfig, config, "video")
    sampling = section(SampleConfig, config, "sample")
    found = memory.stages(memory.CHOICES[-1], model, sampling, video, device=jax.devices()[0])
    (step,) = (stage for stage in found if stage.name.startswith("guided step"))
    assert step.host > quantised_sizes()[0]  # and the matrices of the adapter
    assert step.temporaries > 2**20
