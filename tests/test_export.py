"""`convert_weights.py export`: equal to the imported file, and read by the programs that it is for."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, REFERENCES, as_float32, run_convert_weights
from safetensors.numpy import load_file, save_file

import convert_weights
from fantasy_jax.convert.files import open_weights, write_safetensors
from fantasy_jax.convert.rules import TensorSpec, flat_parameters, load, make_plan
from fantasy_jax.errors import FantasyError, WeightsError
from fantasy_jax.pipelines.talking import BUNDLED
from fantasy_jax.system.registry import components
from fantasy_jax.weights.detect import detect
from fantasy_jax.weights.loading import load_network
from fantasy_jax.weights.store import read_config, save_network


@pytest.fixture
def command(capsys):
    """Runs convert_weights.py; returns exit code, standard output, and the last line of standard error."""

    def run(*arguments):
        code, out, err = run_convert_weights(capsys, *arguments)
        return code, out, err.splitlines()[-1] if err else ""

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A function that makes the store of a reference, once."""

    @functools.cache
    def make(reference):
        folder = tmp_path_factory.mktemp("store")
        for found in detect(open_weights(DATA / reference)):
            save_network(folder / found.component.slot, found.load(), component=found.component.name)
        return folder

    return make


def cases():
    """Every reference, network and layout."""
    for name in REFERENCES:
        for found in detect(open_weights(DATA / name)):
            for layout in found.component.layouts:
                yield name, found.component.name, layout.name


def widened(found):
    """The tensors of a reference's file that are not ignored, float32."""
    needed = found.plan()[1].ignored.keys() ^ found.weights.specs.keys()
    return {key: as_float32(found.weights.read(key)) for key in needed}


@pytest.mark.slow
@pytest.mark.parametrize(("reference", "component", "layout"), list(cases()))
def test_every_layout_of_every_network_can_be_imported_again(store, tmp_path, reference, component, layout):
    folder, file = store(reference) / components()[component].slot, tmp_path / "x.safetensors"
    options = ["--component", folder.name, "--layout", layout, "--output", str(file)]
    assert convert_weights.main(["export", "--weights", str(folder.parent), *options]) == 0
    found = next(x for x in detect(open_weights(DATA / reference)) if x.component.name == component)
    exported = load_file(file)
    if layout == found.layout.name:
        assert exported.keys() == widened(found).keys()
        for key, value in widened(found).items():
            np.testing.assert_array_equal(exported[key], value, strict=True)

    (tmp_path / "config.json").write_text((DATA / reference / "config.json").read_text())
    (again,) = detect(open_weights(file))
    assert (again.component.name, again.layout.name) == (component, layout)
    # The last block of the image encoder is not imported.
    values, wanted = load(again.plan()[1], again.weights.read), load(found.plan()[1], found.weights.read)
    for path, value in wanted.items():
        np.testing.assert_array_equal(values[path], value, strict=True)


def test_import_then_export_returns_a_bfloat16_file(tmp_path, command):
    _, found = detect(open_weights(DATA / "fantasytalking_dit"))
    tensors = {key: value.astype(jnp.bfloat16) for key, value in widened(found).items()}
    save_file(tensors, tmp_path / "in.safetensors")
    (tmp_path / "config.json").write_text((DATA / "fantasytalking_dit" / "config.json").read_text())
    source = ["--fantasytalking", tmp_path / "in.safetensors", "--dtype", "bfloat16"]
    assert command("import", *source, "--output", tmp_path / "store")[0] == 0
    options = ["--component", "audio_adapter", "--output", tmp_path / "out.safetensors"]
    code, out, _ = command("export", "--weights", tmp_path / "store", *options)
    assert code == 0
    size = sum(2 * value.size for value in tensors.values())
    assert f"9 tensors of fantasytalking, official keys, {size:,} bytes of bfloat16" in out
    exported = load_file(tmp_path / "out.safetensors")
    assert exported.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(exported[key], value, strict=True)


def export(store, tmp_path, reference, network, layout):
    """An exported file, read by PyTorch."""
    from safetensors.torch import load_file as load_torch

    file = tmp_path / "x.safetensors"
    options = ["--component", network, "--layout", layout, "--output", str(file)]
    assert convert_weights.main(["export", "--weights", str(store(reference)), *options]) == 0
    return load_torch(file)


def test_the_official_class_loads_the_adapter(store, tmp_path):
    """Loads as fantasy-talking's `load_audio_processor`, but strictly: all keys and no other."""
    import torch
    from torch import nn

    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(32, 48, bias=False)
            self.norm = nn.LayerNorm(48)

    def processor():
        return nn.ModuleDict({name: nn.Linear(48, 96, bias=False) for name in ("k_proj", "v_proj")})

    def block():
        return nn.ModuleDict({"cross_attn": nn.ModuleDict({"processor": processor()})})

    tensors = export(store, tmp_path, "fantasytalking_dit", "audio_adapter", "official")
    parts = {part: {} for part in ("proj_model", "audio_processor")}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    projection = Projection()
    projection.load_state_dict(parts["proj_model"], strict=True)
    blocks = nn.ModuleDict({"blocks": nn.ModuleList(block() for _ in range(3))})
    blocks.load_state_dict(parts["audio_processor"], strict=True)

    config = detect(open_weights(DATA / "fantasytalking_dit"))[1].config
    ours = load_network(store("fantasytalking_dit") / "audio_adapter", config, dtype=jnp.float32)
    features = np.random.default_rng(0).standard_normal((1, 7, 32), np.float32)
    with torch.no_grad():
        theirs = projection.norm(projection.proj(torch.from_numpy(features))).numpy()
    np.testing.assert_allclose(ours.tokens(jnp.asarray(features)), theirs, atol=2e-6)


def test_comfyui_merges_the_adapter_into_the_transformer(store, tmp_path):
    """Its loader adds `k_proj` and `v_proj` to each cross-attention, then reads both files as one."""
    tensors = export(store, tmp_path, "fantasytalking_dit", "audio_adapter", "comfyui")
    assert tensors["proj_model.proj.weight"].shape[0] == 48
    names = {f"blocks.{i}.cross_attn.{x}_proj.weight" for i in range(3) for x in "kv"}
    assert tensors.keys() == names | {
        "proj_model.proj.weight",
        "proj_model.norm.weight",
        "proj_model.norm.bias",
    }
    transformer = export(store, tmp_path, "fantasytalking_dit", "transformer", "official")
    assert not tensors.keys() & transformer.keys()


def test_transformers_loads_the_encoders(store, tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    sizes = json.loads((DATA / "clip_vision" / "config.json").read_text())
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=sizes["dim"],
            intermediate_size=sizes["dim"] * sizes["mlp_ratio"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            image_size=sizes["image_size"],
            patch_size=sizes["patch_size"],
        )
    )
    tensors = export(store, tmp_path, "clip_vision", "image_encoder", "transformers 5")
    faults = clip.load_state_dict(tensors, strict=False)
    assert faults.unexpected_keys == []
    # Layers after the last block but one are not imported: their output is not used.
    behind = (f"encoder.layers.{sizes['num_layers'] - 1}.", "post_layernorm.")
    assert all(key.startswith(behind) for key in faults.missing_keys)

    sizes = json.loads((DATA / "umt5_encoder" / "config.json").read_text())
    umt5 = UMT5EncoderModel(
        UMT5Config(
            vocab_size=sizes["vocab"],
            d_model=sizes["dim"],
            d_kv=sizes["dim_attn"] // sizes["num_heads"],
            d_ff=sizes["dim_ffn"],
            num_layers=sizes["num_layers"],
            num_heads=sizes["num_heads"],
        )
    )
    faults = umt5.load_state_dict(
        export(store, tmp_path, "umt5_encoder", "text_encoder", "diffusers"), strict=False
    )
    assert faults.unexpected_keys == []
    assert set(faults.missing_keys) <= {"encoder.embed_tokens.weight"}


@pytest.mark.slow
def test_exports_of_the_miniature(tmp_path, command):
    """Its VAE and audio adapter have tables of their own; no file is detected as theirs."""
    for slot, layouts in (("vae", ["official"]), ("audio_adapter", ["official", "comfyui"])):
        component, config = read_config(BUNDLED / slot)
        network = load_network(BUNDLED / slot, config, dtype=jnp.bfloat16)
        values = {path: np.asarray(x) for path, x in flat_parameters(network).items()}
        for layout in layouts:
            file = tmp_path / f"{slot}_{layout}.safetensors"
            options = ["--component", slot, "--layout", layout, "--output", file]
            assert command("export", "--weights", BUNDLED, *options)[0] == 0
            weights = open_weights(file)
            rules = next(x.rules for x in component.layouts if x.name == layout)(config)
            again = load(make_plan(rules, weights.specs, flat_parameters(network)), weights.read)
            assert again.keys() == values.keys()
            for path, value in values.items():
                np.testing.assert_array_equal(again[path], value, strict=True)
            with pytest.raises(WeightsError):
                detect(weights)


# Errors: one line, and no file


@pytest.mark.parametrize(
    ("network", "layout", "output", "word"),
    [
        ("vae", "official", "x.safetensors", "vae: "),
        ("audio_adapter", "diffusers", "x.safetensors", "comfyui"),
        ("audio_adapter", "official", "x.pth", "x.pth: "),
        ("audio_adapter", "official", "file/x.safetensors", "file"),
    ],
)
def test_what_cannot_be_exported(store, tmp_path, command, network, layout, output, word):
    (tmp_path / "file").write_text("")
    options = ["--component", network, "--layout", layout, "--output", tmp_path / output]
    code, out, err = command("export", "--weights", store("fantasytalking_dit"), *options)
    assert (code, out) == (2, "")
    assert word in err
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), WeightsError("x: damaged")]
)
def test_a_file_is_written_completely_or_not_at_all(tmp_path, error):
    def tensors():
        yield "a", np.zeros(3, np.float32)
        raise error

    spec = TensorSpec((3,), np.dtype(np.float32))
    with pytest.raises((FantasyError, KeyboardInterrupt)):
        write_safetensors(tmp_path / "x.safetensors", {"a": spec, "b": spec}, tensors())
    assert list(tmp_path.iterdir()) == []


def test_safetensors_reads_the_file(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 4), np.float32).T,
        "half": rng.standard_normal(3).astype(jnp.bfloat16),
        "scalar": np.array(2.0),
        "none": np.zeros((0, 2), np.int8),
    }
    specs = {key: TensorSpec(value.shape, value.dtype) for key, value in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, tensors.items())
    for key, value in load_file(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(value, tensors[key], strict=True)
