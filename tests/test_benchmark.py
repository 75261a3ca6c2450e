"""Timings, their table, and the benchmark's command line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fantasy_jax.performance.chips import CHIPS
from fantasy_jax.performance.program import Program
from fantasy_jax.performance.timing import (
    Timing,
    random_arguments,
    time_calls,
    time_program,
    timing_table,
)

ROOT = Path(__file__).parent.parent


def test_figures_of_a_timing():
    timing = Timing("step", (5.0, 1.0, 2.0, 4.0, 3.0), flops=600, devices=2, peak_flops=1000.0)
    assert timing.median == 3
    assert timing.quartiles == (2, 4)
    assert timing.flops_per_second == 200
    assert timing.peak_fraction == 0.1
    line = timing_table([timing]).splitlines()[-1]
    assert line.startswith("| step | 3000.0 | 2000.0 to 4000.0 | 0.0000 | 0.000 | 10.0 % | - |")
    # The peak of a CPU is unknown, a loader has no operations, and a failed call has no seconds.
    assert replace(timing, peak_flops=None).peak_fraction is None
    assert replace(timing, flops=None).to_json()["tflops_per_second"] is None
    missing = Timing("PyTorch", (), note="disabled")
    assert timing_table([missing]).splitlines()[-1] == "| PyTorch | - | - to - | - | - | - | - | disabled |"


def test_warm_up_calls_are_not_timed():
    calls = []
    assert len(time_calls(lambda: calls.append(0), 3)) == 3
    assert len(calls) > 3


def test_donated_arguments_are_replaced_by_results():
    @jax.jit(donate_argnums=0)
    def step(state, x):
        return {"params": state["params"] + x, "opt_state": state["opt_state"] + 1}, x.sum()

    array = jax.ShapeDtypeStruct((3,), jnp.float32)
    arguments = ({"params": array, "opt_state": array}, array)
    drawn = random_arguments(arguments)
    assert not drawn[0]["opt_state"].any()
    assert drawn[0]["params"].all()
    program = Program("step", lambda: step.lower(*arguments), arguments, 10, 10, step)
    timing = time_program(program, 2, devices=1, dtype="bfloat16")
    assert len(timing.seconds) == 2
    assert timing.memory > 2**20
    assert timing.peak_fraction is None
    assert jax.devices()[0].device_kind not in CHIPS


def run(*options, **environment):
    config = "--config=configs/fantasy_talking_14b.py:debug"
    return subprocess.run(
        [sys.executable, "-m", "fantasy_jax.benchmark", config, *options],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_all_parts_and_pytorch_are_timed(tmp_path):
    settings = {"video.num_frames": 5, "train.stages.0.batch_size": 2, "train.stages.1.batch_size": 2}
    settings |= {"train.loop.num_workers": 0, "train.mesh.fsdp": 1}
    path = tmp_path / "figures.json"
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    options += ["--size=32x32", "--repeats=2", "--against=torch", f"--json={path}"]
    # PyTorch's compiler would take longer than everything else.
    result = run(*options, TORCH_COMPILE_DISABLE="1")
    assert result.returncode == 0, result.stderr[-2000:]
    content = json.loads(path.read_text())
    assert content["clip"] == [5, 32, 32]
    assert set(content["versions"]) == {"jax", "jaxlib", "flax", "torch"}
    timings = {timing["name"]: timing for timing in content["timings"]}
    assert list(timings) == [
        "forward",
        "guided step, 2 branches",
        "stage 1 step",
        "stage 2 step",
        "first frame to latents",
        "a tile of a latent frame to video",
        "loader, 8 clips",
        "forward, PyTorch eager, without audio",
        "forward, PyTorch compiled, without audio",
    ]
    assert all(timing["median_seconds"] > 0 for timing in list(timings.values())[:-1])
    assert timings["guided step, 2 branches"]["flops"] == pytest.approx(
        2 * timings["forward"]["flops"], rel=0.2
    )
    assert "clips/s" in timings["loader, 8 clips"]["note"]
    assert "times ours" in timings["forward, PyTorch eager, without audio"]["note"]
    assert timings["forward, PyTorch compiled, without audio"]["note"] == "disabled"
    assert "| first frame to latents |" in result.stdout
