"""What the kernels of attention run on each device, and what training saves of them, in lowered programs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract, relative
from jax._src.cudnn import fused_attention_stablehlo

from fantasy_jax.models import splash
from fantasy_jax.models.attention import attention, use_backend
from fantasy_jax.models.context_attention import context_attention
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.performance.flops import hardware_flops, model_flops
from fantasy_jax.sharding import make_mesh

pytestmark = pytest.mark.networks

PLATFORMS = {"splash": "tpu", "cudnn": "cuda"}


@pytest.fixture(autouse=True)
def _cudnn_is_installed(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def kernels(backend, function, *arguments):
    """The kernels of a function lowered for the platform of a backend: names, and types of their operands."""
    with use_backend(backend):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(PLATFORMS[backend],))
    return re.findall(r"custom_call @(tpu_custom_call|__cudnn\S*?)\(.*: \((.*)\) ->", lowered.as_text())


def total(attend, *arguments):
    return (attend(*arguments).astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize(
    ("backend", "saved", "forward"),
    [
        ("splash", (), 4),
        ("splash", ("self_attention",), 3),
        ("splash", ("products",), 2),
        ("cudnn", ("self_attention",), 3),
        ("cudnn", ("products",), 2),
    ],
    ids=str,
)
def test_kernels_of_a_training_step(backend, saved, forward):
    """Self-attention and attention to text: forward, forward again unless it is saved, and backward."""
    config = WanConfig(
        dim=128, ffn_dim=8, frequency_dim=8, text_dim=8, text_length=128, image_dim=8, num_heads=1,
        num_layers=2,
    )  # fmt: skip
    model = abstract(WanTransformer, config, dtype=jnp.bfloat16, remat_save_names=saved)
    graphdef, state = nnx.split(model)

    def loss(state, latents, first_frame, timestep, text, image):
        model = nnx.merge(graphdef, state)
        return model(latents, first_frame, timestep, model.conditions(text, image)).sum()

    inputs = (1, 3, 16, 16, 16), (1, 3, 16, 16, 20), (1,), (1, 128, 8), (1, 5, 8)
    found = kernels(backend, jax.grad(loss), state, *(array(*shape, dtype=jnp.float32) for shape in inputs))
    assert len(found) == forward + 2
    if backend == "cudnn":
        assert [name for name, _ in found].count("__cudnn$fmhaSoftmaxBackward") == 2


def test_the_fused_backward_kernel_equals_the_separate_ones(monkeypatch):
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 256)  # two blocks of queries and of keys
    q, k, v = (
        jnp.asarray(np.random.default_rng(i).normal(size=(1, 500, 1, 128)), jnp.float32) for i in range(3)
    )

    def gradients():
        attend = partial(splash.splash_attention, kv_lengths=None, scale=128**-0.5, interpret=True)
        return jax.jit(jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2)))(q, k, v)

    fused = gradients()
    separate = splash.kernels.BlockSizes(
        block_q=256, block_kv=256, block_q_dkv=256, block_kv_dkv=256, block_q_dq=256, block_kv_dq=256
    )
    monkeypatch.setattr(splash, "_block_sizes", lambda queries, keys: separate)
    for one, other in zip(fused, gradients(), strict=True):
        assert relative(one, other) < 5e-7


@pytest.mark.parametrize(
    ("length", "largest", "block"),
    [
        (175, 1024, 256),
        (512, 1024, 512),
        (513, 1024, 640),
        (1344, 2048, 1408),
        (21_504, 1024, 1024),
        (21_504, 2048, 1536),
        (24_000, 1024, 512),
        (75_600, 2048, 2048),
        (5376, 1024, 768),  # the queries of one of four devices
    ],
)
def test_blocks_need_little_padding(length, largest, block):
    assert splash.choose_block(length, largest) == block
    assert splash.choose_block(length, largest, halved=True) - block in (0, 128)


@pytest.mark.parametrize(("keys", "lengths", "segmented"), [(512, None, 0), (512, [512], 1), (500, None, 1)])
def test_segment_ids_are_given_where_keys_are_padded(keys, lengths, segmented):
    lengths = None if lengths is None else jnp.array(lengths)
    attend = partial(splash.splash_attention, kv_lengths=lengths, scale=1.0)
    program = str(jax.make_jaxpr(attend)(array(1, 256, 1, 128), *[array(1, keys, 1, 128)] * 2))
    assert ("segmented" in program) == segmented


@pytest.mark.parametrize(
    ("strategy", "queries", "keys"),
    [("gather", "1x128x2x64", "1x256x2x64"), ("all_to_all", *["1x256x1x64"] * 2)],
)
def test_cudnn_runs_on_the_arrays_of_each_device(strategy, queries, keys):
    x, text = array(2, 256, 4, 64), array(2, 160, 4, 64)
    attend = partial(context_attention, kv_length=250, strategy=strategy)
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)):
        found = kernels("cudnn", jax.grad(partial(total, attend), (0, 1, 2)), x, x, x)
        ((_, cross),) = kernels("cudnn", attention, x, text, text)
        clip = kernels("cudnn", attention, *[array(1, 257, 1, 80)] * 3)  # nothing of it can be sharded
    assert [name for name, _ in found] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    for _, operands in found:
        assert operands.startswith(", ".join(f"tensor<{shape}xbf16>" for shape in (queries, keys, keys)))
    assert cross.startswith("tensor<1x128x2x64xbf16>, tensor<1x160x2x64xbf16>")
    assert clip[0][1].startswith("tensor<1x257x1x80xbf16>")


@pytest.mark.parametrize(
    ("backend", "padded"), [("splash", 512 * 384), ("cudnn", 500 * 300), ("xla", 500 * 300)]
)
def test_flops_of_kernels_count_what_they_compute(backend, padded):
    q, k = array(2, 500, 4, 128), array(2, 300, 4, 128)
    products = 2 * 2 * 4 * 128
    gradient = jax.grad(partial(total, attention), (0, 1, 2))
    backward = 4 if backend == "xla" else 5
    with use_backend(backend):
        assert hardware_flops(attention, q, k, k) == 2 * products * padded
        # Splash also multiplies the output by its gradient, element by element.
        expected = (2 + backward) * products * padded
        assert hardware_flops(gradient, q, k, k) == pytest.approx(expected, rel=1e-3)
    assert model_flops(gradient, q, k, k) == 6 * products * 500 * 300


def test_flops_of_results_that_nobody_needs_do_not_count():
    q, k = array(2, 500, 4, 128), array(2, 300, 4, 128)
    queries_alone = jax.grad(lambda q, k, v: total(attention, q, k, v))
    assert model_flops(queries_alone, q, k, k) == 4 * 2 * 2 * 4 * 128 * 500 * 300
