"""Counts of operations and collectives against known values; AOT compilation for TPU slices."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import abstract
from jax.sharding import NamedSharding, PartitionSpec

import sample
import train
from fantasy_jax.config import build, load_config
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.performance import ahead
from fantasy_jax.performance.chips import CHIPS, chip_of
from fantasy_jax.performance.collectives import Collective, UnknownTripCountError, collectives
from fantasy_jax.performance.flops import model_flops
from fantasy_jax.performance.program import Program, device_bytes
from fantasy_jax.performance.programs import sampling_programs
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.sharding import MeshConfig, make_mesh
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.video import VideoConfig

ROOT = Path(__file__).parent.parent
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_flops_of_products_and_convolutions():
    assert model_flops(lambda x, y: x @ y, array(3, 4), array(4, 5)) == 2 * 3 * 4 * 5
    product = lambda x, y: jnp.einsum("bij,bkj->bik", x, y)  # noqa: E731
    assert model_flops(jax.jit(product), array(2, 3, 4), array(2, 5, 4)) == 2 * 2 * 3 * 4 * 5
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert model_flops(convolve, array(1, 8, 8, 6), array(3, 3, 3, 10)) == 2 * 4 * 4 * 10 * (3 * 3 * 3)


def test_flops_of_loops_count_per_iteration_and_of_branches_once():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    assert model_flops(loop, array(4, 4)) == 7 * 2 * 4**3
    assert model_flops(lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x, x), array(4, 4)) == 7 * 2 * 4**3
    with pytest.raises(ValueError, match="while"):
        model_flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), array(4, 4))


def transformer_flops(layers, remat_save_names=None, *, backward=False):
    config = WanConfig(
        dim=32, ffn_dim=64, frequency_dim=16, text_dim=8, text_length=4, image_dim=8, num_heads=2,
        num_layers=layers,
    )  # fmt: skip
    graphdef, state = nnx.split(abstract(WanTransformer, config, remat_save_names=remat_save_names))

    def run(state, latents, first_frame, timestep, text, image):
        model = nnx.merge(graphdef, state)
        return model(latents, first_frame, timestep, model.conditions(text, image)).sum()

    inputs = array(1, 3, 8, 8, 16), array(1, 3, 8, 8, 20), array(1), array(1, 4, 8), array(1, 5, 8)
    return model_flops(jax.grad(run) if backward else run, state, *inputs)


def test_flops_of_a_transformer_layer():
    one, two, five = (transformer_flops(n) for n in (1, 2, 5))
    assert five - one == 4 * (two - one)
    tokens, dim, ffn, text, image = 3 * 16, 32, 64, 4, 5
    linear = 2 * tokens * dim * (4 * dim + 2 * dim + 2 * ffn) + 2 * (text + image) * 2 * dim * dim
    attended = 4 * tokens * dim * (tokens + text + image)
    assert two - one == linear + attended


def test_flops_of_the_backward_pass_and_of_recomputation():
    def layer(**options):
        return transformer_flops(2, **options) - transformer_flops(1, **options)

    forward, saved = layer(), layer(backward=True)
    recomputed = layer(backward=True, remat_save_names=())
    assert 2.9 < saved / forward < 3.1
    assert 3.8 < recomputed / forward <= 4.1


def test_collectives_of_a_loop_count_per_iteration():
    mesh = make_mesh(fsdp=8)
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = NamedSharding(mesh, PartitionSpec(None, "fsdp"))

    def loop(x, weights):
        def body(x, weight):
            weight = jax.lax.with_sharding_constraint(weight, replicated)
            return jnp.tanh(x @ weight), None

        return jax.lax.scan(body, x, weights)[0]

    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=sharded)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    found = collectives(jax.jit(loop).lower(x, weights).compile().as_text())
    assert found["all-gather"].count in (1, 5)  # in the loop, or all of them before it
    assert found["all-gather"].bytes == 5 * 16 * 16 * 4


LOOP = """
%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {{
  %p = (u32[], f32[4]{{0}}) parameter(0)
  %stride = u32[]{{:T(128)}} constant({stride})
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %next = u32[]{{:T(128)}} {operation}(%i, %stride)
  %sent = f32[4]{{0}} collective-permute(%x), source_target_pairs={{{{0,1}}}}
  ROOT %result = (u32[], /*index=1*/f32[4]{{0}}) tuple(%next, %sent)
}}

%condition (p: (u32[], f32[4])) -> pred[] {{
  %p = (u32[], f32[4]{{0}}) parameter(0)
  %i = u32[]{{:T(128)}} get-tuple-element(%p), index=0
  %bound = u32[]{{:T(128)}} constant(8)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  %start = u32[] constant({start})
  %copy = u32[] copy(%start)
  %initial = (u32[], f32[4]{{0}}) tuple(%copy, %x)
  %loop = (u32[], f32[4]{{0}}) while(%initial), condition=%condition, body=%body{note}
  ROOT %y = f32[4]{{0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
    ("start", "stride", "note", "trips"),
    [
        (0, 1, "", 8),
        (0, 2, "", 4),  # windowed products, which the TPU compiler unrolls
        (1, 3, "", 3),
        (0, 1, ', backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
)
def test_trip_count_of_a_loop(start, stride, note, trips):
    program = LOOP.format(start=start, stride=stride, note=note, operation="add")
    assert collectives(program) == {"collective-permute": Collective(trips, 16 * trips)}


def test_unknown_trip_count():
    with pytest.raises(UnknownTripCountError, match="body"):
        collectives(LOOP.format(start=1, stride=2, note="", operation="multiply"))


def test_reduce_scatters_count_their_operands_as_an_instruction_and_as_a_kernel():
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
    assert collectives(program) == {
        "all-reduce": Collective(1, 16),
        "reduce-scatter": Collective(2, 2 * 8 * 16 * 2),
    }


def test_largest_arrays_of_a_chip():
    mesh = make_mesh(fsdp=8)
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = {"a": jax.ShapeDtypeStruct((80,), jnp.float32, sharding=sharded), "b": {"c": array(30)}}
    assert ahead.largest_arrays(tree) == {"b/c": 120, "a": 40}
    in_host = jax.ShapeDtypeStruct((80,), jnp.float32, sharding=sharded.with_memory_kind("pinned_host"))
    assert (device_bytes([tree, in_host]), device_bytes([tree, in_host], in_host=True)) == (160, 40)
    assert device_bytes(tree, {"fsdp": 4}) == 200


class Compiled:
    """A program in place of the compiler's: 4 + 2 GB of memory, and HLO text."""

    def __init__(self, text):
        self.text = text

    def lower(self):
        return SimpleNamespace(compile=lambda: self)

    def memory_analysis(self):
        return SimpleNamespace(
            argument_size_in_bytes=3 * 10**9,
            output_size_in_bytes=2 * 10**9,
            alias_size_in_bytes=10**9,
            temp_size_in_bytes=2 * 10**9,
        )

    def as_text(self):
        return self.text


ALL_REDUCE = """
ENTRY %main (x: f32[250000000]) -> f32[250000000] {
  %x = f32[250000000]{0} parameter(0)
  ROOT %sum = f32[250000000]{0} all-reduce(%x), to_apply=%add
}
"""


@pytest.fixture
def on_v5e(monkeypatch):
    """Compiles a program, whose chips are those of a v5e:2x4, and returns the report."""
    monkeypatch.setattr(ahead, "chip_of", lambda device: CHIPS["TPU v5 lite"])

    def compile_program(lower, arguments=(), flops=7 * 10**15, hardware_flops=8 * 10**15):
        program = Program("step", lower, arguments, flops, hardware_flops, print)
        return ahead.compile_program(program, "v5e:2x4", make_mesh(fsdp=8))

    return compile_program


def test_report_of_a_program_that_fits(on_v5e, capsys, tmp_path):
    report = on_v5e(Compiled(ALL_REDUCE).lower)
    assert (report.argument_bytes, report.temporary_bytes, report.fits) == (4 * 10**9, 2 * 10**9, True)
    assert report.collectives == {"all-reduce": Collective(1, 10**9)}
    # 197 TFLOP/s, 819 GB/s of memory, 200 GB/s of links; temporaries move twice, and so does an all-reduce.
    expected = {"compute": 1e15 / 197e12, "memory": 8 / 819, "links": 2 / 200}
    assert report.roofline == pytest.approx(expected)
    assert report.bottleneck == "compute"
    assert ahead.show([report]) == 0
    assert "| all-reduce 1.00 |" in capsys.readouterr().out
    ahead.write_json(tmp_path / "report.json", [report])
    (written,) = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert written["bottleneck"] == "compute"
    assert written["collectives"]["all-reduce"]["bytes"] == 10**9


class Unreadable(Compiled):
    """A program whose text JAX cannot make."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update\na stack trace")


@pytest.mark.parametrize(
    "program", [Compiled(LOOP.format(start=1, stride=2, note="", operation="multiply")), Unreadable("")]
)
def test_report_of_a_program_with_unknown_collectives(program, on_v5e, capsys, caplog):
    report = on_v5e(program.lower)
    assert report.fits
    assert report.collectives is None
    assert "stack trace" not in caplog.text
    assert ahead.show([report]) == 0
    assert "| unknown |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 16.00G hbm.",
        "the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_report_of_a_program_that_does_not_fit(message, on_v5e, capsys):
    def compile_():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    arguments = {"kernel": array(2**28, dtype=jnp.bfloat16), "bias": array(16)}
    report = on_v5e(lambda: SimpleNamespace(compile=compile_), arguments)
    assert not report.fits
    assert report.argument_bytes + report.temporary_bytes == int(20.5 * 2**30)
    assert list(report.largest_arguments) == ["kernel", "bias"]
    assert ahead.show([report]) == 1
    printed = capsys.readouterr().out
    assert "0.500 GiB  kernel" in printed
    assert report.would_fit
    assert all(f"  {setup}\n" in printed for setup in report.would_fit)


def test_size_option():
    video = VideoConfig(height=512, width=256)
    assert ahead.with_size(video, None) == video
    assert ahead.with_size(video, "720x1280") == VideoConfig(height=720, width=1280)
    for wrong in ("720", "700x1280", "0x16", "bigxsmall"):
        with pytest.raises(ConfigError, match=f"--size={wrong}"):
            ahead.with_size(video, wrong)


def test_unknown_device():
    with pytest.raises(ConfigError, match="device"):
        chip_of(jax.devices()[0])


def test_programs_of_all_encoders():
    config = load_config(str(ROOT / "configs/fantasy_talking_14b.py:debug"))
    model, sample = build(ModelConfig, config.model, "model"), build(SampleConfig, config.sample, "sample")
    mesh = make_mesh(fsdp=1)
    with jax.set_mesh(mesh):
        programs = sampling_programs(model, sample, build(VideoConfig, config.video, "video"), mesh)
        first = list(itertools.islice(programs, 3))
    assert [program.name for program in first] == ["text encoder", "image encoder", "speech encoder"]
    assert all(program.flops for program in first)
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(first[0].arguments))


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
@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5e:2x4", "v6e:2x4", "v7x:2x2x1"])
def test_train_steps_compile_for_a_slice(topology, tmp_path):
    result, reports = compile_only("configs/fantasy_talking_14b.py:debug", topology, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [report["program"] for report in reports] == ["stage 1 step", "stage 2 step"]
    for report in reports:
        assert report["fits"]
        assert report["num_chips"] == 8
        if topology != "v7x:2x2x1":  # JAX 0.10 cannot read the text of its programs
            assert report["collectives"]["all-gather"]["count"] > 0


@pytest.mark.slow
def test_train_steps_compile_for_two_slices(tmp_path):
    result, reports = compile_only(
        "configs/fantasy_talking_14b.py:debug", "v5e:2x2*2", tmp_path, "--config.train.mesh.data=2"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert {report["num_chips"] for report in reports} == {8}
    assert reports[0]["mesh"] == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


@pytest.mark.slow
def test_sampling_programs_compile_for_a_slice(tmp_path):
    mesh = ("--config.sample.mesh.context=2", "--config.sample.mesh.tensor=4")
    result, reports = compile_only(
        "configs/fantasy_talking_14b.py:debug", "v6e:2x4", tmp_path, *mesh, program="sample.py"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [report["program"] for report in reports] == [
        "text encoder",
        "image encoder",
        "speech encoder",
        "first frame to latents",
        "conditions",
        "guided step, 2 branches",
        "latent frame to video",
    ]
    assert all(report["fits"] and report["flops"] for report in reports)
    # Halos go both ways for 22 convolutions of the encoder and 33 of the decoder, one way for 3 of stride 2.
    # Keys and values are gathered as bfloat16, the type of products there; and latents, for the transformer.
    frames, latents, width = 3, 3 * 8 * 8, 32
    encoding, decoding = (reports[i]["collectives"] for i in (3, 6))
    assert encoding.keys() == decoding.keys() == {"all-gather", "collective-permute"}
    assert encoding["collective-permute"]["count"] == frames * (2 * 22 + 3)
    assert decoding["collective-permute"]["count"] == 2 * 33
    assert decoding["all-gather"]["bytes"] == latents // frames * 2 * width * 2
    assert encoding["all-gather"]["bytes"] == latents * (2 * width * 2 + 16 * 4)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["conditions", "guided step"])
def test_weights_are_copied_from_the_memory_of_a_tpus_host(program, tmp_path):
    options = ("--config.sample.weights_memory=host", f"--only={program}")
    result, reports = compile_only(
        "configs/fantasy_talking_14b.py:debug", "v5e:1x1", tmp_path, *options, program="sample.py"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [report["fits"] for report in reports] == [True]


@pytest.mark.slow
def test_train_steps_of_the_14b_model_compile_for_64_chips(tmp_path):
    result, reports = compile_only("configs/fantasy_talking_14b.py", "v5p:4x4x4", tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for report in reports:
        assert report["argument_bytes"] + report["temporary_bytes"] < 0.9 * report["chip_memory"]
        # Two operations per parameter and token forward; nearly as many backward, for gradients of adapters.
        forward = 2 * 16e9 * 16 * 21 * 32 * 32
        assert 2 * forward < report["flops"] < 4 * forward
        # The forward kernel of self-attention is not run again, and its backward kernel is fused.
        assert report["flops"] < report["hardware_flops"] < 45e15
        # Every device gathers all weights, forward and backward, and the other keys and values of its clips.
        weights = 2 * 2 * 14e9
        assert weights < report["collectives"]["all-gather"]["bytes"] < 3 * weights
        assert report["bottleneck"] == "compute"


@pytest.mark.slow
def test_a_train_step_of_the_14b_model_compiles_for_16_chips(tmp_path):
    # Without a context axis the compiler makes loops of its own, of products and collective-permutes.
    result, reports = compile_only("configs/fantasy_talking_14b.py", "v5p:2x2x4", tmp_path, "--only=stage 1")
    assert result.returncode == 0, result.stderr[-2000:]
    (report,) = reports
    assert report["collectives"]["collective-permute"]["count"] > 1000


@pytest.mark.parametrize(
    ("options", "word"),
    [((), "--topology"), (("--topology=v5p:4x4x4", "--size=100x100"), "--size=100x100")],
)
def test_invalid_options_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        train.main(["--config=configs/fantasy_talking_14b.py", "--compile_only", *options])


@pytest.mark.parametrize("option", ["--topology=v5p:4x4x4", "--size=64x64", "--only=guided", "--json=x.json"])
@pytest.mark.parametrize("command", [sample.main, train.main], ids=["sample", "train"])
def test_options_that_would_have_no_effect_are_refused(command, option):
    if (command, option) == (sample.main, "--size=64x64"):
        return  # it is the size of the clip that is sampled
    with pytest.raises(ConfigError, match="compile_only"):
        command(["--config=configs/fantasy_talking_14b.py", option])


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed; pip install '.[tpu]'")
def test_a_name_that_no_program_has():
    def programs(video, mesh):
        return [SimpleNamespace(name="first"), SimpleNamespace(name="second")]

    with pytest.raises(ConfigError, match="first, second"):
        ahead.compile_programs(
            programs, VideoConfig(), topology="v5e:2x2", mesh_config=MeshConfig(fsdp=4), only="third"
        )
