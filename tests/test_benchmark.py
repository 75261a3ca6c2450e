"""What is timed, how it is summed up, and PyTorch beside it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from fantasy_jax.performance.ahead import Program
from fantasy_jax.performance.chips import CHIPS
from fantasy_jax.performance.timing import Timing, draw, table, time_calls, time_program

ROOT = Path(__file__).parent.parent


def test_figures_of_a_timing():
    timing = Timing("step", (5.0, 1.0, 2.0, 4.0, 3.0), flops=600, devices=2, peak_flops=1000.0)
    assert timing.median == 3
    assert timing.quartiles == (2, 4)
    assert timing.flops_per_second == 200
    assert timing.share_of_peak == 0.1
    line = table([timing]).splitlines()[-1]
    assert line.startswith("| step | 3000.0 | 2000.0 to 4000.0 | 0.0000 | 0.000 | 10.0 % | - |")
    # A CPU has no peak that is known, a loader no operations, and what is missing no seconds.
    assert replace(timing, peak_flops=None).share_of_peak is None
    assert replace(timing, flops=None).to_json()["tflops_per_second"] is None
    missing = Timing("PyTorch", (), note="disabled")
    assert table([missing]).splitlines()[-1] == "| PyTorch | - | - to - | - | - | - | - | disabled |"


def test_calls_that_warm_up_do_not_count():
    calls = []
    assert len(time_calls(lambda: calls.append(0), 3)) == 3
    assert len(calls) > 3


def test_a_program_that_is_given_its_argument_for_good_gets_its_result():
    @jax.jit(donate_argnums=0)
    def step(state, x):
        return {"params": state["params"] + x, "optimizer": state["optimizer"] + 1}, x.sum()

    array = jax.ShapeDtypeStruct((3,), jnp.float32)
    arguments = ({"params": array, "optimizer": array}, array)
    drawn = draw(arguments)
    assert not drawn[0]["optimizer"].any()
    assert drawn[0]["params"].all()
    program = Program("step", lambda: step.lower(*arguments), arguments, 10, step)
    timing = time_program(program, 2, devices=1, dtype="bfloat16")
    assert len(timing.seconds) == 2
    assert timing.memory > 2**20
    assert timing.share_of_peak is None
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
def test_every_part_is_timed_and_pytorch_beside_it(tmp_path):
    settings = {"sample.max_frames": 5, "train.clip_stage.batch_size": 2, "train.frame_stage.batch_size": 2}
    settings |= {"train.loop.workers": 0, "train.mesh.fsdp": 1}
    path = tmp_path / "figures.json"
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    options += ["--size=32x32", "--repeats=2", "--against=torch", f"--json={path}"]
    # PyTorch's compiler would take longer than all the rest.
    result = run(*options, TORCH_COMPILE_DISABLE="1")
    assert result.returncode == 0, result.stderr[-2000:]
    content = json.loads(path.read_text())
    assert content["clip"] == [5, 32, 32]
    assert set(content["versions"]) == {"jax", "jaxlib", "flax", "torch"}
    timings = {timing["name"]: timing for timing in content["timings"]}
    assert list(timings) == [
        "forward",
        "guided step, 3 branches",
        "clip_stage step",
        "frame_stage step",
        "first frame to latents",
        "a tile of latents to video",
        "loader, 8 clips",
        "forward, PyTorch eager, without audio",
        "forward, PyTorch compiled, without audio",
    ]
    assert all(timing["median_seconds"] > 0 for timing in list(timings.values())[:-1])
    assert timings["guided step, 3 branches"]["flops"] == pytest.approx(
        3 * timings["forward"]["flops"], rel=0.2
    )
    assert "clips/s" in timings["loader, 8 clips"]["note"]
    assert "times ours" in timings["forward, PyTorch eager, without audio"]["note"]
    assert timings["forward, PyTorch compiled, without audio"]["note"] == "disabled"
    assert "| first frame to latents |" in result.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--only=forward,encoder", "there is no 'encoder'; use forward, guided_step"),
        ("--repeats=1", "--repeats=1: at least 2 are needed"),
        ("--size=100x100", "--size=100x100: height and width are needed"),
    ],
)
def test_what_cannot_be_timed_is_one_line(option, message):
    result = run(option)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
