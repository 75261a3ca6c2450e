"""Checkpoints as other programs write and download them: wrapped, quantised, in variants, or no weights."""

import json
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative, run_convert_weights
from safetensors.numpy import save_file
from test_import import adapter, layout_tensors, official, references, tiny, write_pickle  # noqa: F401

from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import LINEAR, Entry, Plan
from fantasy_jax.errors import WeightsError
from fantasy_jax.models.eight_bit import quantize
from fantasy_jax.preprocessing.text import load_tokenizer
from fantasy_jax.system.registry import components
from fantasy_jax.weights.importer import _layers_of, import_weights
from fantasy_jax.weights.loading import load_network


@pytest.fixture
def command(capsys):
    """Runs convert_weights.py; returns exit code, standard output and standard error."""
    return lambda *arguments: run_convert_weights(capsys, *arguments)


@pytest.fixture
def transformer(references):  # noqa: F811
    """The transformer's tensors under the official keys, float32."""
    return layout_tensors(references, "wan2.1_i2v_dit", "official")


# One file a network


@pytest.mark.parametrize(
    "prefix", ["model.diffusion_model.", "diffusion_model.", "module.", "model.", "a.b."]
)
def test_keys_after_any_prefix(tmp_path, transformer, command, prefix):
    save_file({f"{prefix}{key}": x for key, x in transformer.items()}, tmp_path / "x.safetensors")
    code, out, err = command("inspect", tmp_path / "x.safetensors")
    assert (code, err) == (0, "")
    assert f"wan2.1_i2v_dit, official keys, sizes of tiny, after {prefix}\n" in out


def test_a_network_that_is_there_twice_is_refused(tmp_path, transformer, command):
    twice = {f"{prefix}.{key}": x for prefix in ("student", "teacher") for key, x in transformer.items()}
    save_file(twice, tmp_path / "x.safetensors")
    code, _, err = command("inspect", tmp_path / "x.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    assert "student." in err
    assert "teacher." in err


def sentencepiece(text="a woman is talking to the camera, and a man sings a song"):
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentences = iter([text] * 20)
    SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=30,
        minloglevel=2,
        hard_vocab_limit=False,
        **ids,
    )
    return model.getvalue()


def readable(folder, content):
    """Whether transformers can read a tokenizer of SentencePiece here, and it; it needs a recent protobuf."""
    (folder / "spm").mkdir()
    (folder / "spm/spiece.model").write_bytes(content)
    (folder / "spm/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    try:
        return load_tokenizer(folder / "spm")
    except WeightsError:
        return None


def comfyui_files(folder, references, transformer):  # noqa: F811
    """The four files of ComfyUI; returns options."""
    folder.mkdir()
    content = sentencepiece()
    clip = layout_tensors(references, "clip_vision", "official")
    tensors = {
        "transformer": {f"model.diffusion_model.{key}": x for key, x in transformer.items()},
        "vae": layout_tensors(references, "wan_vae", "official"),
        "text_encoder": layout_tensors(references, "umt5_encoder", "transformers")
        | {"spiece_model": np.frombuffer(content, np.uint8)},
        "image_encoder": {key.removeprefix("visual."): x for key, x in clip.items() if "visual." in key},
    }
    for name, values in tensors.items():
        save_file(values, folder / f"{name}.safetensors")
    options = [f"--{name}={folder / name}.safetensors" for name in tensors]
    if readable(folder, content) is None:
        (folder / "bytes").mkdir()
        (folder / "bytes/tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
        options.append(f"--tokenizer={folder / 'bytes'}")
    return options


def assert_equal(folder, references, names):  # noqa: F811
    from fantasy_jax.convert.rules import flat_parameters

    for name in names:
        config, values = references[name]
        loaded = flat_parameters(load_network(folder / components()[name].slot, config, dtype=jnp.float32))
        for path, value in values.items():
            np.testing.assert_array_equal(loaded[path], value)


def test_files_of_comfyui_one_each(tmp_path, references, transformer, command):  # noqa: F811
    options = comfyui_files(tmp_path / "files", references, transformer)
    code, out, err = command("import", *options, f"--output={tmp_path / 'store'}", "--dtype=float32")
    assert code == 0, err
    assert out.count("GiB of float32") == 4
    names = ("wan2.1_i2v_dit", "wan_vae", "umt5_encoder", "clip_vision")
    assert_equal(tmp_path / "store", references, names)
    stored = load_tokenizer(tmp_path / "store/text_encoder/tokenizer")
    if expected := readable(tmp_path, sentencepiece()):
        assert stored("a woman sings")["input_ids"] == expected("a woman sings")["input_ids"]


def test_a_text_encoder_without_a_tokenizer_is_refused(tmp_path, references, command):  # noqa: F811
    save_file(layout_tensors(references, "umt5_encoder", "transformers"), tmp_path / "t.safetensors")
    code, _, err = command("import", f"--text_encoder={tmp_path}/t.safetensors", f"--output={tmp_path / 's'}")
    assert (code, err.count("\n"), "--tokenizer" in err) == (2, 1, True)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_file_in_place_of_that_of_the_folder(tmp_path, references, transformer):  # noqa: F811
    wan = official(tmp_path / "wan", references)
    for shard in wan.glob("diffusion_pytorch_model*"):
        shard.unlink()
    save_file({key: 2 * x for key, x in transformer.items()}, tmp_path / "t.safetensors")
    sources = {"transformer": tmp_path / "t.safetensors"}
    lines = import_weights(tmp_path / "store", wan=wan, sources=sources, dtype=jnp.float32, progress=False)
    assert len(lines) == 4
    config, values = references["wan2.1_i2v_dit"]
    doubled = {"wan2.1_i2v_dit": (config, {path: 2 * value for path, value in values.items()})}
    assert_equal(tmp_path / "store", {**references, **doubled}, ["wan2.1_i2v_dit", "wan_vae", "clip_vision"])


# Wrapped pickles


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"state_dict": x},
        lambda x: {"model": x, "step": 7, "loss": 0.5, "name": "run", "betas": (0.9, 0.99), "note": None},
        lambda x: {"state_dict": {"model": x}, "optimizer": {"state": {0: x["a.weight"]}}},
        lambda x: x | {"step": 7, "config": {"name": "run", "sizes": [1, 2]}},
    ],
)
def test_a_wrapped_pickle(tmp_path, wrap):
    import torch

    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    torch.save(wrap(tensors), tmp_path / "x.ckpt")
    weights = open_weights(tmp_path / "x.ckpt")
    assert weights.specs.keys() == {"a.weight", "b"}
    np.testing.assert_array_equal(weights.read("a.weight"), np.arange(6.0).reshape(2, 3))


def test_nothing_of_a_pickle_is_dropped_that_may_be_weights(tmp_path):
    import torch

    one = torch.ones(2)
    torch.save({"model": {"a": one}, "head": {"b": one}, "optimizer": {"c": one}}, tmp_path / "x.pt")
    assert open_weights(tmp_path / "x.pt").specs.keys() == {"model.a", "head.b", "optimizer.c"}


def test_two_models_in_a_pickle_are_refused(tmp_path):
    import torch

    torch.save({name: {"a": torch.ones(2)} for name in ("model", "ema")}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="model and ema"):
        open_weights(tmp_path / "x.pt")


# Folders


def save_pickle(path, tensors):
    write_pickle(path, {key: np.array(x) for key, x in tensors.items()})


TENSORS = {"a": np.arange(3.0, dtype=np.float32), "b": np.ones(2, np.float32)}


def write_index(folder, name, shards):
    (folder / name).write_text(json.dumps({"weight_map": shards}))


def test_an_index_of_pickles(tmp_path):
    save_pickle(tmp_path / "pytorch_model-1.bin", {"a": TENSORS["a"]})
    save_pickle(tmp_path / "pytorch_model-2.bin", {"b": TENSORS["b"]})
    shards = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    write_index(tmp_path, "pytorch_model.bin.index.json", shards)
    weights = open_weights(tmp_path)
    np.testing.assert_array_equal(weights.read("a"), TENSORS["a"])
    assert weights.specs.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("files", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "", "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["wan_bf16.safetensors", "wan_fp8_scaled.safetensors"], "fp8_scaled", "wan_fp8_scaled.safetensors"),
        (["wan_bf16.safetensors", "wan_fp8_scaled.safetensors"], "", None),
        (["wan_bf16.safetensors", "wan_fp8_scaled.safetensors"], "fp32", None),
        (["model.safetensors", "pytorch_model.bin"], "", "model.safetensors"),
        (["pytorch_model.bin", "chinese-wav2vec2-base-fairseq-ckpt.pt"], "", "pytorch_model.bin"),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "", "pytorch_model.bin"),
        (["only.safetensors"], "fp16", "only.safetensors"),
    ],
)
def test_the_weights_of_a_folder(tmp_path, files, variant, chosen):
    for name in files:
        (save_file if name.endswith(".safetensors") else lambda x, path: save_pickle(path, x))(
            TENSORS, tmp_path / name
        )
    if chosen is None:
        with pytest.raises(WeightsError, match="--variant") as error:
            open_weights(tmp_path, variant=variant)
        assert all(name in str(error.value) for name in files)
    else:
        assert open_weights(tmp_path, variant=variant).path.name == chosen


@pytest.mark.parametrize("names", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_a_variant_of_an_index(tmp_path, names):
    save_file(TENSORS, tmp_path / "model-1.safetensors")
    save_file(TENSORS, tmp_path / "model.fp16-1.safetensors")
    write_index(tmp_path, "model.safetensors.index.json", dict.fromkeys(TENSORS, "model-1.safetensors"))
    write_index(tmp_path, names, dict.fromkeys(TENSORS, "model.fp16-1.safetensors"))
    assert open_weights(tmp_path).path.name == "model.safetensors.index.json"
    assert open_weights(tmp_path, variant="fp16").path.name == names


# Quantised


def float8(value, scale):
    return (value / scale).astype(jnp.float8_e4m3fn)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_scales_are_applied(tmp_path, name, rows, pickled):
    value = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) * 30
    scale = np.abs(value).max(1, keepdims=True) / 400 if rows else np.float32([np.abs(value).max() / 400])
    tensors = {"x.weight": float8(value, scale), f"x.{name}": scale.astype(np.float32), "x.bias": value[0]}
    if not pickled:
        save_file(tensors | {"scaled_fp8": np.zeros(2, jnp.float8_e4m3fn)}, tmp_path / "x.safetensors")
    else:
        import torch

        small = torch.from_numpy(tensors["x.weight"].view(np.uint8)).view(torch.float8_e4m3fn)
        others = {key: torch.from_numpy(x) for key, x in tensors.items() if key != "x.weight"}
        torch.save({"x.weight": small, **others}, tmp_path / "x.pth")
    weights = open_weights(tmp_path)
    assert weights.specs.keys() == {"x.weight", "x.bias"}
    assert weights.specs["x.weight"].dtype == np.float32
    exact = tensors["x.weight"].astype(np.float32) * scale.astype(np.float32)
    np.testing.assert_array_equal(weights.read("x.weight"), exact, strict=True)
    assert relative(exact, value) < 0.05


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x.scale_weight": None}, "x.weight is float8"),
        ({"x.scale_weight": np.ones((2, 2), np.float32)}, "as a whole or by rows"),
        ({"x.scale_weight": np.ones(6, np.float32)}, "as a whole or by rows"),
        ({"x.weight": None}, "missing"),
        ({"y.weight": np.zeros((4, 6), np.int8)}, "y.weight is int8"),
    ],
)
def test_float8_is_never_read_without_its_scale(tmp_path, change, match):
    tensors = {
        "scaled_fp8": np.zeros(0, jnp.float8_e4m3fn),
        "x.weight": np.zeros((4, 6), jnp.float8_e4m3fn),
        "x.scale_weight": np.ones((), np.float32),
    }
    kept = {key: x for key, x in (tensors | change).items() if x is not None}
    save_file(kept, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=match):
        open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("given", ["float8", "float32"])
def test_weights_of_eight_bits_are_imported_as_they_are(tmp_path, references, transformer, command, given):  # noqa: F811
    tensors, scales = dict(transformer), {}
    for key in [x for x in tensors if x.startswith("blocks.") and tensors[x].ndim == 2 and given == "float8"]:
        scales[key] = np.array(np.abs(tensors[key]).max() / 400, np.float32)
        tensors[key] = float8(tensors[key], scales[key])
        tensors[key.replace(".weight", ".scale_weight")] = scales[key]
    save_file(tensors, tmp_path / "x.safetensors")
    arguments = ("import", f"--transformer={tmp_path / 'x.safetensors'}", f"--output={tmp_path / 's'}")
    code, out, _ = command(*arguments, "--dtype=fp8")
    assert (code, out.endswith(" GiB of bfloat16 and float8_e4m3fn\n")) == (0, True)
    config = references["wan2.1_i2v_dit"][0]
    network = load_network(tmp_path / "s" / "transformer", config, dtype=jnp.bfloat16)
    assert network.text_in.kernel.dtype == network.blocks.mlp_in.bias.dtype == jnp.bfloat16
    for index in range(config.num_layers):
        key, layer = f"blocks.{index}.ffn.0.weight", network.blocks.mlp_in
        if given == "float8":
            assert (np.asarray(layer.weight_scale[index]) == scales[key]).all()
            stored = np.asarray(layer.weight[index])
            np.testing.assert_array_equal(stored, tensors[key], strict=True)
        else:
            weight, scale = quantize(tensors[key], jnp.float8_e4m3fn)
            np.testing.assert_array_equal(layer.weight[index], weight, strict=True)
            np.testing.assert_array_equal(layer.weight_scale[index], scale, strict=True)
    assert "already complete" in command(*arguments, "--dtype=fp8")[1]
    code, _, err = command(*arguments, "--dtype=bfloat16")
    assert (code, "delete it, or choose another --output" in err) == (2, True)


def test_a_fused_layer_does_not_take_the_scale_of_a_part():
    parts = [Entry(key, "layers/qkv/kernel", None, LINEAR, (i, 2)) for i, key in enumerate("qk")]
    plan = Plan([*parts, Entry("o", "layers/out/kernel", None, LINEAR)], {}, {}, [])
    layers = dict.fromkeys(("layers/qkv", "layers/out"), "int8")
    assert _layers_of(plan, layers) == {"layers/qkv": None, "layers/out": "o"}


def test_integers_without_a_scale_are_no_weights(tmp_path, transformer, command):
    key = "blocks.0.ffn.0.weight"
    save_file(transformer | {key: transformer[key].astype(np.int8)}, tmp_path / "x.safetensors")
    code, out, _ = command("inspect", tmp_path / "x.safetensors")
    assert code == 1
    assert f"wrong type: {key} is int8" in out


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_gguf(tmp_path, references, transformer, kind):  # noqa: F811
    import gguf

    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    exact = {}
    for key, value in transformer.items():
        quantised = kind if value.ndim == 2 and value.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        if value.ndim > 4:  # llama.cpp allows four axes; ComfyUI-GGUF notes the shape
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
        flat = value.reshape(-1) if value.ndim > 4 else value
        data = gguf.quants.quantize(flat, quantised)
        exact[key] = gguf.quants.dequantize(data, quantised).reshape(value.shape)
        writer.add_tensor(key, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = open_weights(tmp_path / "x.gguf")
    for key, value in exact.items():
        np.testing.assert_array_equal(weights.read(key), value, err_msg=key)
    assert max(relative(exact[key], transformer[key]) for key in exact) < 0.02
    import_weights(
        tmp_path / "s",
        sources={"transformer": tmp_path / "x.gguf"},
        dtype="float32",
        progress=False,
    )
    shutil.copy(tmp_path / "x.gguf", cut := tmp_path / "cut.gguf")
    cut.write_bytes(cut.read_bytes()[:-500])
    with pytest.raises(WeightsError, match="cut off"):
        open_weights(cut)


# What is no weights file, under any suffix


def whole_safetensors(folder):
    save_file(TENSORS, folder / "whole")
    return (folder / "whole").read_bytes()


def whole_pickle(folder):
    save_pickle(folder / "whole", TENSORS)
    return (folder / "whole").read_bytes()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 3361\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pth", ".bin", ".gguf", ".onnx", ""])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda folder: LFS, "Git LFS"),
        (lambda folder: PAGE, "web page"),
        (lambda folder: b'{"error": "Repository not found"}', "JSON"),
        (lambda folder: bytes(5000), "zeros"),
        (lambda folder: b"", "empty"),
        (lambda folder: b"\x1f\x8b" + bytes(99), "archive"),
        (lambda folder: b"Entry not found", "text"),
        (lambda folder: whole_safetensors(folder)[:-3], "cut off"),
        (lambda folder: whole_pickle(folder)[:-200], "its end is missing"),
    ],
)
def test_what_is_no_weights_file(tmp_path, content, word, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content(tmp_path))
    with pytest.raises(WeightsError, match=word) as error:
        open_weights(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.safetensors.part", "x.ckpt.crdownload", "x.bin.incomplete", "x.pth"])
def test_an_unfinished_download(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(struct.pack("<Q", 10**6))
    if name == "x.pth":
        path.with_name("x.pth.aria2").touch()
    with pytest.raises(WeightsError, match="not finished"):
        open_weights(path)


# Import


def test_a_source_that_changed_is_seen_though_its_size_did_not(tmp_path, references, command):  # noqa: F811
    file, store = adapter(tmp_path / "f.ckpt", references), tmp_path / "store"
    arguments = ("import", f"--fantasytalking={file}", f"--output={store}")
    assert command(*arguments)[0] == 0
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, _, err = command(*arguments)
    assert code == 2
    assert "before they were changed" in err
