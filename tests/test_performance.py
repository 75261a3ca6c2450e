"""Counts of operations and exchanges against what is known otherwise; programs for other machines."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.config import ConfigError
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.performance import ahead
from fantasy_jax.performance.ahead import clip_size, weighty
from fantasy_jax.performance.chips import CHIPS, chip_of
from fantasy_jax.performance.collectives import Exchange, exchanges
from fantasy_jax.performance.flops import count_flops
from fantasy_jax.sharding import make_mesh

ROOT = Path(__file__).parent.parent
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_products_and_convolutions():
    assert count_flops(lambda x, y: x @ y, array(3, 4), array(4, 5)) == 2 * 3 * 4 * 5
    product = lambda x, y: jnp.einsum("bij,bkj->bik", x, y)  # noqa: E731
    assert count_flops(jax.jit(product), array(2, 3, 4), array(2, 5, 4)) == 2 * 2 * 3 * 4 * 5
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert count_flops(convolve, array(1, 8, 8, 6), array(3, 3, 3, 10)) == 2 * 4 * 4 * 10 * (3 * 3 * 3)


def test_loops_count_as_often_as_they_run_and_branches_once():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    assert count_flops(loop, array(4, 4)) == 7 * 2 * 4**3
    assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x, x), array(4, 4)) == 7 * 2 * 4**3
    with pytest.raises(ValueError, match="while loop"):
        count_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), array(4, 4))


def transformer_flops(layers, saved_names=None, *, backward=False):
    config = WanConfig(
        dim=32, ffn_dim=64, frequency_dim=16, text_dim=8, text_length=4, image_dim=8, num_heads=2,
        num_layers=layers,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: WanTransformer(config, rngs=nnx.Rngs(0), saved_names=saved_names))
    graphdef, state = nnx.split(model)

    def run(state, latents, first_frame, timestep, text, image):
        model = nnx.merge(graphdef, state)
        return model(latents, first_frame, timestep, model.conditions(text, image)).sum()

    inputs = array(1, 3, 8, 8, 16), array(1, 3, 8, 8, 20), array(1), array(1, 4, 8), array(1, 5, 8)
    return count_flops(jax.grad(run) if backward else run, state, *inputs)


def test_a_transformer_is_counted_layer_for_layer():
    one, two, five = (transformer_flops(n) for n in (1, 2, 5))
    assert five - one == 4 * (two - one)
    tokens, dim, ffn, text, image = 3 * 16, 32, 64, 4, 5
    linear = 2 * tokens * dim * (4 * dim + 2 * dim + 2 * ffn) + 2 * (text + image) * 2 * dim * dim
    attended = 4 * tokens * dim * (tokens + text + image)
    assert two - one == linear + attended


def test_the_backward_pass_and_what_it_computes_anew_are_counted():
    def layer(**options):
        return transformer_flops(2, **options) - transformer_flops(1, **options)

    forward, kept = layer(), layer(backward=True)
    anew = layer(backward=True, saved_names=())
    assert 2.9 < kept / forward < 3.1
    assert 3.8 < anew / forward <= 4.1


def test_exchanges_are_read_off_a_program_loops_and_all():
    mesh = make_mesh(fsdp=8)
    whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def loop(x, weights):
        def body(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, whole)
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(body, x, weights)[0]

    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=cut)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    found = exchanges(jax.jit(loop).lower(x, weights).compile().as_text())
    assert found["all-gather"].count in (1, 5)  # in the loop, or all of them before it
    assert found["all-gather"].bytes == 5 * 16 * 16 * 4


def test_a_reduce_scatter_counts_what_goes_in_however_it_is_written():
    program = """
%all-reduce-scatter.1 (input: bf16[8,16]) -> bf16[2,16] {
  %input = bf16[8,16]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,16]{1,0} all-reduce(%input), to_apply=%add
  ROOT %slice.1 = bf16[2,16]{1,0} dynamic-slice(%all-reduce.1, %index), dynamic_slice_sizes={2,16}
}

ENTRY %main (x: bf16[8,16], y: f32[4]) -> bf16[2,16] {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[4]{0} parameter(1)
  %all-reduce.2 = f32[4]{0} all-reduce(%y), to_apply=%sum
  %reduce-scatter.1 = bf16[2,16]{1,0:T(8,128)(2,1)} reduce-scatter(%x), dimensions={0}, to_apply=%add
  ROOT %fusion.1 = bf16[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert exchanges(program) == {
        "all-reduce": Exchange(1, 16),
        "reduce-scatter": Exchange(2, 2 * 8 * 16 * 2),
    }


def test_what_weighs_most_on_a_chip():
    mesh = make_mesh(fsdp=8)
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = {"a": jax.ShapeDtypeStruct((80,), jnp.float32, sharding=cut), "b": {"c": array(30)}}
    assert weighty(tree) == {"b/c": 120, "a": 40}


@pytest.mark.parametrize(
    "words",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 16.00G hbm.",
        "the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_is_accounted_for(words, monkeypatch, capsys):
    monkeypatch.setattr(ahead, "chip_of", lambda device: CHIPS["TPU v5 lite"])

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {words}")

    arguments = {"kernel": array(2**28, dtype=jnp.bfloat16), "bias": array(16)}
    report = ahead.compile_ahead(
        ahead.Program("step", Lowered, arguments, 10, print), "v5e:2x4", make_mesh(fsdp=8)
    )
    assert not report.fits
    assert report.arguments + report.temporaries == int(20.5 * 2**30)
    assert ahead.show([report], None) == 1
    printed = capsys.readouterr().out
    assert "of 16: does not fit" in printed
    assert "0.500 GiB  kernel" in printed


def test_sizes_of_clips():
    assert clip_size(None, 512) == (512, 512)
    assert clip_size("720x1280", 512) == (720, 1280)
    for wrong in ("720", "700x1280", "0x16", "bigxsmall"):
        with pytest.raises(ConfigError, match=f"--size={wrong}: height and width"):
            clip_size(wrong, 512)


def compile_only(config, topology, tmp_path, *options, program="train.py"):
    if not HAS_COMPILER:
        assert "CI" not in os.environ, "CI installs the extra `tpu`"
        pytest.skip("libtpu is not installed; pip install '.[tpu]'")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [
        sys.executable, program, f"--config={config}", "--compile_only", f"--topology={topology}",
        f"--json={tmp_path / 'report.json'}", *options,
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    path = tmp_path / "report.json"
    return result, json.loads(path.read_text())["reports"] if path.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
def test_the_small_system_compiles_for_a_slice(topology, tmp_path):
    result, reports = compile_only("configs/fantasy_talking_14b.py:debug", topology, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [report["program"] for report in reports] == ["clip_stage step", "frame_stage step"]
    for report in reports:
        assert report["fits"]
        assert report["chips"] == 8
        assert report["exchanges"]["all-gather"]["count"] > 0


@pytest.mark.slow
def test_the_small_system_compiles_for_two_slices(tmp_path):
    result, reports = compile_only(
        "configs/fantasy_talking_14b.py:debug", "v5e:2x2*2", tmp_path, "--config.train.mesh.data=2"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert {report["chips"] for report in reports} == {8}
    assert reports[0]["mesh"] == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


@pytest.mark.slow
def test_all_that_samples_compiles_for_a_slice(tmp_path):
    mesh = ("--config.sample.mesh.context=2", "--config.sample.mesh.tensor=4")
    result, reports = compile_only(
        "configs/fantasy_talking_14b.py:debug", "v6e:2x4", tmp_path, *mesh, program="sample.py"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [report["program"] for report in reports] == [
        "text encoder",
        "picture encoder",
        "speech encoder",
        "first frame to latents",
        "guided step, 3 branches",
        "latents to video",
    ]
    assert all(report["fits"] and report["flops"] for report in reports)
    # Rows go both ways for 22 convolutions of the encoder and 33 of the decoder, one way for 3 that halve.
    # Keys and values are gathered, as what products take on a TPU; and latents, for the transformer.
    frames, latents, width = 3, 3 * 8 * 8, 32
    encoding, decoding = (reports[i]["exchanges"] for i in (3, 5))
    assert encoding.keys() == decoding.keys() == {"all-gather", "collective-permute"}
    assert encoding["collective-permute"]["count"] == frames * (2 * 22 + 3)
    assert decoding["collective-permute"]["count"] == frames * 2 * 33
    assert decoding["all-gather"]["bytes"] == latents * 2 * width * 2
    assert encoding["all-gather"]["bytes"] == latents * (2 * width * 2 + 16 * 4)


@pytest.mark.slow
def test_a_step_of_the_14b_model_compiles_for_64_chips(tmp_path):
    result, reports = compile_only("configs/fantasy_talking_14b.py", "v5p:4x4x4", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for report in reports:
        need = report["arguments"] + report["temporaries"]
        assert need < 0.9 * report["memory"]
        assert report["compile_seconds"] < 180
        # Two for each parameter and token, forward; for the adapters' sake nearly as many backward.
        forward = 2 * 16e9 * 16 * 21 * 32 * 32
        assert 2 * forward < report["flops"] < 5 * forward
        # Every device gets every weight, forward and backward, and keys and values of its clips' other parts.
        weights = 2 * 2 * 14e9
        assert weights < report["exchanges"]["all-gather"]["bytes"] < 3 * weights
        assert report["binding"] == "compute"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--topology is needed"),
        (("--topology=v5p:4x4x4", "--size=100x100"), "--size=100x100: height and width are needed"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(options, message):
    command = [
        sys.executable,
        "train.py",
        "--config=configs/fantasy_talking_14b.py",
        "--compile_only",
        *options,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_table_of_peaks_names_sensible_numbers():
    for chip in CHIPS.values():
        assert math.log10(chip.flops) == pytest.approx(14.6, abs=0.5)
        assert 10e9 < chip.memory < 200e9
    with pytest.raises(ConfigError, match="its peaks are not known here"):
        chip_of(jax.devices()[0])
