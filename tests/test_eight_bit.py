"""8-bit weights and products: error bounds, stores, LoRA beside them, and weights in the host's memory."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import DATA, layer, random_network, relative, run_convert_weights
from safetensors.numpy import load_file, save_file

from configs.fantasy_talking_14b import small_model
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.models.eight_bit import (
    DTYPES,
    EightBitLinear,
    linear_layers,
    multiply_eight_bit,
    quantize,
    quantize_values,
)
from fantasy_jax.models.lora import LoRAConfig, add_lora, lora_of
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.sharding import make_mesh, parameter_shardings
from fantasy_jax.system.networks import EIGHT_BIT_LAYERS
from fantasy_jax.system.registry import component_of
from fantasy_jax.training.parameters import lora_layers
from fantasy_jax.weights.loading import StoredLoader, load_network
from fantasy_jax.weights.lora import LoRAFile, open_loras
from fantasy_jax.weights.quantize import quantize_store
from fantasy_jax.weights.store import LORA, save_network

MODEL = small_model()
CONFIG = MODEL.transformer
MANIFEST = "wan2.1_i2v_14b_dit.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of a transformer with an adapter and of a text encoder, float32, and a file of settings."""
    folder = tmp_path_factory.mktemp("store")
    for seed, slot in enumerate(("transformer", "text_encoder", "audio_adapter")):
        config = MODEL.networks[slot]
        save_network(folder / slot, random_network(config, seed), component=component_of(config).name)
    (folder / "pipeline.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def stores(store, tmp_path_factory):
    """The same store with 8-bit weights of each type."""
    folders = {dtype: tmp_path_factory.mktemp(dtype) for dtype in DTYPES}
    for dtype, folder in folders.items():
        quantize_store(store, folder, dtype, progress=False)
    return folders


def load(folder, slot="transformer", **options):
    return load_network(folder / slot, MODEL.networks[slot], dtype=jnp.float32, **options)


# Rounding


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounding_errors_of_each_row_are_bounded(dtype):
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 40, 200)).astype(np.float32) * np.float32(10) ** random.uniform(
        -5, 3, (3, 40, 1)
    ).astype(np.float32)
    x[0, 0] = 0
    rounded, scale = quantize(x, dtype)
    assert (rounded.dtype, scale.dtype, scale.shape) == (dtype, np.float32, (3, 40))
    error = np.abs(x - rounded.astype(np.float32) * scale[..., None])
    # Half a step: of int8 one scale; of e4m3 an eighth of a power of two, and 2^-9 at the least.
    step = np.float32(1) if dtype == np.int8 else np.maximum(np.abs(x / scale[..., None]) / 8, 2.0**-9)
    assert (error <= step * scale[..., None] * 0.5001).all()
    assert np.abs(rounded[0, 1].astype(np.float32)).max() == (127 if dtype == np.int8 else 448)
    assert (rounded[0, 0].astype(np.float32) == 0).all()
    for ours, numpys in zip(quantize(jnp.asarray(x), dtype), (rounded, scale), strict=True):
        np.testing.assert_array_equal(ours, numpys)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_multiplies_as_written_out_in_numpy(dtype, products):
    linear = nnx.Linear(96, 40, dtype=jnp.float32, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.linspace(-1, 1, 40)
    weight, scale = quantize(np.asarray(linear.kernel).T, DTYPES[dtype])
    eight_bit = EightBitLinear(linear, DTYPES[dtype])
    eight_bit.weight[...], eight_bit.weight_scale[...] = jnp.asarray(weight), jnp.asarray(scale)
    eight_bit.products = products
    x = np.random.default_rng(1).standard_normal((2, 5, 96)).astype(np.float32)
    rounded, row_scale = quantize(x, DTYPES[dtype]) if products else (x, np.ones(x.shape[:-1]))
    summed = rounded.astype(np.float64) @ weight.T.astype(np.float64)
    wanted = summed * row_scale[..., None] * scale + np.asarray(linear.bias)
    assert relative(eight_bit(jnp.asarray(x)), wanted) < 1e-6
    assert relative(eight_bit(jnp.asarray(x)), linear(x)) < (0.02 if dtype == "int8" else 0.05)


@pytest.mark.parametrize(("dtype", "kind", "sum_"), [("int8", "i8", "i32"), ("fp8", "f8E4M3FN", "f32")])
def test_operands_of_eight_bits_go_straight_into_the_product(dtype, kind, sum_):
    x = jax.ShapeDtypeStruct((3, 32), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((16, 32), DTYPES[dtype])
    for platform in ("cuda", "tpu"):
        lowered = jax.jit(multiply_eight_bit).trace(x, weight).lower(lowering_platforms=(platform,)).as_text()
        (product,) = (line for line in lowered.splitlines() if "stablehlo.dot_general" in line)
        assert f"(tensor<3x32x{kind}>, tensor<16x32x{kind}>) -> tensor<3x16x{sum_}>" in product
        assert "%arg1, contracting_dims = [1] x [1]" in product  # the stored weights themselves


# Stores


@pytest.mark.parametrize("dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_store_holds_the_blocks_in_eight_bits_and_links_to_the_rest(store, stores, dtype):
    folder = stores[dtype]
    record = json.loads((folder / "transformer/component.json").read_text())
    name = str(DTYPES[dtype])
    assert record["dtype"] == "float32"
    assert record["other_dtypes"]["blocks/mlp_in/weight"] == name
    assert len(record["other_dtypes"]) == 24
    assert (folder / "audio_adapter").readlink() == store / "audio_adapter"
    assert (folder / "pipeline.json").read_text() == "{}"
    for slot in ("transformer", "text_encoder"):
        before, after = flat_parameters(load(store, slot)), flat_parameters(load(folder, slot))
        layers = {path.removesuffix("/weight"): name for path in after if path.endswith("/weight")}
        assert layers == {
            path.removesuffix("/kernel"): name
            for path in before
            if path.endswith("/kernel") and path.startswith("blocks/")
        }
        wanted = quantize_values({path: np.asarray(x) for path, x in before.items()}, layers)
        assert after.keys() == wanted.keys()
        for path, value in after.items():
            np.testing.assert_array_equal(np.asarray(value), wanted[path], strict=True, err_msg=path)


def test_an_interrupted_quantisation_continues_and_nothing_is_overwritten(store, stores, tmp_path, capsys):
    folder = stores["int8"]
    command = ("quantize", f"--weights={store}", f"--output={tmp_path / 'out'}", "--dtype")
    shutil.copytree(folder, tmp_path / "out", symlinks=True)
    complete = (tmp_path / "out/transformer/component.json").stat().st_mtime_ns
    # As after an interruption within the second network.
    partial = tmp_path / "out/text_encoder.partial"
    (tmp_path / "out/text_encoder").rename(partial)
    record = json.loads((partial / "component.json").read_text())
    (partial / "started.json").write_text(json.dumps({k: x for k, x in record.items() if k != "items"}))
    shutil.rmtree(partial / "blocks_01")
    code, out, _ = run_convert_weights(capsys, *command, "int8")
    assert (code, out.count(" layers of int8, "), out.count(": as it is, a link")) == (0, 2, 1)
    assert (tmp_path / "out/transformer/component.json").stat().st_mtime_ns == complete
    code, out, _ = run_convert_weights(capsys, "check", tmp_path / "out")
    assert (code, out.count("intact")) == (0, 3)
    for arguments, reason in (
        (("fp8",), "holds other weights"),
        (("int8", "--layers=^vae/"), "no linear layer matches"),
        (("int8", "--layers=("), "no regular expression"),
        (("int8", f"--weights={folder}"), "has 8-bit weights already"),
    ):
        code, _, err = run_convert_weights(capsys, *command, *arguments)
        assert (code, err.count("\n")) == (2, 1), arguments
        assert reason in err


@pytest.mark.slow
def test_an_export_has_the_kernels_again(store, stores, tmp_path, capsys):
    exported = []
    for number, weights in enumerate((store, stores["fp8"])):
        path = tmp_path / f"{number}.safetensors"
        arguments = (f"--weights={weights}", "--component=transformer", f"--output={path}")
        assert run_convert_weights(capsys, "export", *arguments)[0] == 0
        exported.append(load_file(path))
    assert exported[0].keys() == exported[1].keys()
    for key, value in exported[0].items():
        assert value.dtype == exported[1][key].dtype
        assert relative(exported[1][key], value) < (0.03 if key.startswith("blocks.") else 1e-9), key


# Networks


@nnx.jit
def velocity(network):
    """What a transformer with an audio adapter predicts for fixed inputs."""
    key = jax.random.key(0)
    widths = (CONFIG.text_dim, CONFIG.image_dim, MODEL.speech_encoder.hidden_size)
    text, image, audio = (jax.random.normal(key, (2, 5, width)) for width in widths)
    conditions = network.conditions(text, image)
    conditions["audio"] = network.adapters["audio"].condition(audio, 5, attention="frame")
    latents, frame = (jax.random.normal(key, (2, 2, 4, 4, channels)) for channels in (16, 20))
    return network(latents, frame, jnp.array([500.0, 900.0]), conditions)


def transformer(folder, mesh=None, **options):
    """The transformer of a store with its adapter, float32."""
    load, dtype = StoredLoader(folder, **options), jnp.dtype("float32")
    sizes = (CONFIG, MODEL.audio_adapter)
    network, adapter = (load(component_of(each), each, dtype, mesh) for each in sizes)
    network.adapters["audio"] = adapter
    return network


@pytest.fixture(scope="module")
def outputs(store, stores):
    """What the transformer predicts with weights of 32 bits and of int8."""
    folders = {"float32": store, "int8": stores["int8"]}
    return {name: velocity(transformer(folder)) for name, folder in folders.items()}


@pytest.mark.slow
def test_networks_compute_about_the_same(outputs, stores):
    weights_alone = relative(outputs["int8"], outputs["float32"])
    assert 1e-4 < weights_alone < 0.02
    both = velocity(transformer(stores["int8"], eight_bit_products=True))
    assert weights_alone < relative(both, outputs["float32"]) < 0.05


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
def test_weights_in_the_memory_of_the_host_give_the_same_bits(outputs, store, stores, dtype):
    network = transformer({"float32": store, **stores}[dtype], weights_memory="host")
    places = {path: value.sharding.memory_kind for path, value in flat_parameters(network).items()}
    in_host = {path for path, kind in places.items() if kind == "pinned_host"}
    stacked = {path for path in places if path.startswith(("blocks/", "adapters/audio/layers/"))}
    assert in_host == {path for path in stacked if path.endswith(("/kernel", "/weight"))}
    np.testing.assert_array_equal(velocity(network), outputs[dtype])


def test_only_one_device_takes_weights_from_the_host(stores):
    with pytest.raises(ConfigError, match="weights_memory"):
        transformer(stores["int8"], make_mesh(fsdp=2), weights_memory="host")


def test_products_in_eight_bits_need_such_weights(store):
    with pytest.raises(ConfigError, match="eight_bit_products"):
        StoredLoader(store, eight_bit_products=True)  # before weights are read


def test_the_difference_of_a_lora_file_needs_weights_of_16_bits(stores, tmp_path):
    difference = np.ones((CONFIG.ffn_dim, CONFIG.dim), np.float32)
    save_file({"diffusion_model.blocks.0.ffn.0.diff": difference}, tmp_path / "x.safetensors")
    loras = open_loras([LoRAFile(str(tmp_path / "x.safetensors"))], CONFIG)
    with pytest.raises(WeightsError, match="cannot change 8-bit weights"):
        StoredLoader(stores["int8"], merge_lora=False, loras=loras)


@pytest.mark.slow
def test_a_lora_lies_beside_the_weights_and_is_not_merged(store, stores, tmp_path):
    rules = (("^blocks/.*kernel$|text_in/kernel", "lora"), ("", "frozen"))
    plain = transformer(store)
    add_lora(plain, lora_layers(plain, rules), LoRAConfig(rank=3, alpha=4.0), rngs=nnx.Rngs(0))
    matrices = random_network(lora_of(plain).config, seed=9)
    shutil.copytree(stores["int8"], tmp_path / "int8", symlinks=True)
    save_network(tmp_path / "int8" / LORA, matrices, component=LORA)
    x = jnp.linspace(-1, 1, CONFIG.ffn_dim)
    beside, without = (
        layer(transformer(folder, merge_lora=False).blocks, 1).mlp_out
        for folder in (tmp_path / "int8", stores["int8"])
    )
    matrices = matrices.products()["blocks/mlp_out"]
    added = 4 / 3 * x @ matrices.lora_a[1] @ matrices.lora_b[1]
    assert relative(beside(x) - without(x), added) < 1e-5
    with pytest.raises(WeightsError, match="merge_lora=False") as caught:
        transformer(tmp_path / "int8")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_network_on_a_mesh_equals_the_one_on_one_device(outputs, stores):
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    expected = flat_parameters(transformer(stores["int8"]))
    with jax.set_mesh(mesh):
        found = transformer(stores["int8"], mesh)
        state = nnx.state(found, nnx.Param)
        leaves, wanted = map(jax.tree.leaves, (state, parameter_shardings(state, mesh)))
        assert [leaf.sharding for leaf in leaves] == wanted
        weight = found.blocks.mlp_in.weight[...]
        assert weight.sharding.shard_shape(weight.shape) == (2, 48, 24)
        same = velocity(found)
    for path, value in flat_parameters(found).items():
        np.testing.assert_array_equal(value, expected[path], strict=True, err_msg=path)
    assert relative(same, outputs["int8"]) < 1e-5


def test_the_full_size_takes_half_the_memory():
    component, manifest = component_of(WanConfig()), json.loads((DATA / "manifests" / MANIFEST).read_text())
    network = component.abstract(WanConfig(), jnp.bfloat16)
    layers = linear_layers(network, EIGHT_BIT_LAYERS, "int8", prefix="transformer/")
    assert len(layers) == 12
    found = flat_parameters(component.abstract(WanConfig(), jnp.bfloat16, layers))
    scales = sum(x.size for path, x in found.items() if path.endswith("/weight_scale"))
    published = sum(math.prod(shape) for shape in manifest["tensors"].values())
    assert sum(x.size for x in found.values()) - scales == published
    # All but 0.3 GB outside the blocks, and their biases and norms, has 8 bits.
    assert published < sum(x.size * x.dtype.itemsize for x in found.values()) < 1.02 * published
