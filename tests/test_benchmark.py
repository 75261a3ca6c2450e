"""Timings, their table, and the benchmark's command line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from fantasy_jax.errors import ConfigError
from fantasy_jax.performance import profile
from fantasy_jax.performance.chips import CHIPS
from fantasy_jax.performance.profile import kernel_table, kernels_of, read_kernels
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


def test_kernels_of_a_trace(tmp_path):
    @jax.jit
    def step(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x)

    array = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = Program("step", lambda: step.lower(array), (array,), 10, 10, step)
    time_program(program, 2, devices=1, dtype="float32", trace_to=tmp_path)
    kernels = {kernel.name: kernel for kernel in read_kernels(tmp_path)}
    assert sum("tanh" in name and kernel.calls == 5 for name, kernel in kernels.items()) == 1
    (loop,) = (kernel for name, kernel in kernels.items() if name.startswith("while"))
    # The loop's own time is without its body's.
    assert 0 <= loop.seconds < sum(kernel.seconds for kernel in kernels.values()) / 2
    lines = kernel_table(list(kernels.values()), most=1).splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("| the rest |")
    shares = [float(line.split("|")[-2].removesuffix(" % ")) for line in lines[2:]]
    assert sum(shares) == pytest.approx(100, abs=0.11)


def plane(name, **lines):
    """A plane of a trace; lines are lists of names, starts and ends."""
    return SimpleNamespace(
        name=name,
        lines=[
            SimpleNamespace(
                name=line.replace("_", " "),
                events=[
                    SimpleNamespace(name=x, start_ns=float(start), duration_ns=float(end - start), stats=[])
                    for x, start, end in events
                ],
            )
            for line, events in lines.items()
        ],
    )


def test_kernels_of_devices():
    host = plane("/host:CPU", python=[("main", 0, 99)])
    stream = [("sdpa", 0, 6), ("gemm_1", 6, 8), ("gemm_2", 8, 12)]
    gpu = plane("/device:GPU:0", **{"Stream_#1(Compute)": stream, "Stream_#2(Memcpy)": [("copy", 0, 1)]})
    names = [(x.name, x.calls, round(1e9 * x.seconds)) for x in kernels_of([host, gpu])]
    assert sorted(names) == [("copy", 1, 1), ("gemm", 2, 6), ("sdpa", 1, 6)]
    # Two chips; a loop contains its operations, and the line of modules contains all.
    operations = [("%while.1 = (f32[]) while(%x)", 0, 10), ("%dot.3 = f32[] dot(%y)", 1, 8)]
    chips = [plane(f"/device:TPU:{i}", XLA_Modules=[("m", 0, 50)], XLA_Ops=operations) for i in range(2)]
    names = [(x.name, x.calls, round(1e9 * x.seconds)) for x in kernels_of(chips)]
    assert names == [("dot", 1, 7), ("while", 1, 3)]


def test_a_profile_that_would_crash_is_refused(monkeypatch):
    monkeypatch.setattr(profile, "find_spec", lambda name: name == "libtpu")
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        with pytest.raises(ConfigError, match=r"^--profile: .*JAX_PLATFORMS=cpu"):
            profile.check_profiler()
    finally:
        jax.config.update("jax_platforms", platforms)


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
    options += ["--size=32x32", "--repeats=2", "--against=torch", f"--json={path}", f"--profile={tmp_path}"]
    # PyTorch's compiler would take longer than everything else.
    result = run(*options, TORCH_COMPILE_DISABLE="1")
    assert result.returncode == 0, result.stderr[-2000:]
    content = json.loads(path.read_text())
    assert content["clip"] == [5, 32, 32]
    assert (content["eight_bit"], content["weights_memory"]) == (None, "device")
    assert set(content["versions"]) == {"jax", "jaxlib", "flax", "torch"}
    timings = {timing["name"]: timing for timing in content["timings"]}
    assert list(timings) == [
        "forward",
        "guided step, 2 branches",
        "stage 1 step",
        "stage 2 step",
        "first frame to latents",
        "latent frame to video",
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
    assert result.stdout.count("| kernel |") == 6
    assert len(list(tmp_path.glob("*/plugins/profile/*/*.trace.json.gz"))) == 6
