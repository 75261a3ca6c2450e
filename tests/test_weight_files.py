"""Weight files of all kinds, valid and damaged."""

import json
import os
import pickle
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, run_convert_weights
from safetensors.numpy import save_file

from fantasy_jax.convert.files import open_weights
from fantasy_jax.errors import WeightsError

MANIFESTS = DATA / "manifests"


@pytest.fixture
def command(capsys):
    """Runs convert_weights.py; returns exit code, standard output and standard error."""
    return lambda *arguments: run_convert_weights(capsys, *arguments)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 5), np.float32),
        "a.half": rng.standard_normal((2, 2)).astype(np.float16),
        "b.bfloat16": rng.standard_normal((4, 3)).astype(jnp.bfloat16),
        "b.count": np.arange(3),
        "b.scalar": np.array(2.5, np.float32),
        "b.none": np.zeros((0, 3), np.float32),
    }


def assert_holds(weights, tensors):
    assert weights.specs.keys() == tensors.keys()
    for key, value in tensors.items():
        assert weights.specs[key].shape == value.shape
        assert weights.specs[key].dtype == value.dtype
        np.testing.assert_array_equal(weights.read(key), value, strict=True)


def write_shards(folder, tensors, *, index=None):
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: value for key, value in tensors.items() if names[key] == name}, folder / name)
    index = names if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return names


def nested(tensors):
    """A dictionary of dictionaries of PyTorch tensors."""
    import torch

    groups = {}
    for key, value in tensors.items():
        group, name = key.split(".")
        if value.dtype == jnp.bfloat16:
            tensor = torch.from_numpy(value.astype(np.float32)).bfloat16()
        else:
            tensor = torch.from_numpy(value)
        groups.setdefault(group, {})[name] = tensor
    return groups


# Kinds of files


def test_a_safetensors_file_and_its_folder(tmp_path, tensors):
    save_file(tensors, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text('{"dim": 3}')
    for path in (tmp_path / "weights.safetensors", tmp_path):
        weights = open_weights(path)
        assert_holds(weights, tensors)
        assert weights.config == {"dim": 3}


def test_shards_by_their_folder_or_index(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    assert_holds(open_weights(tmp_path), tensors)
    assert_holds(open_weights(tmp_path / "model.safetensors.index.json"), tensors)


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_of_tensors(tmp_path, tensors, suffix, wrapped, zipped):
    import torch

    content = {"model_state": nested(tensors), "step": 3} if wrapped else nested(tensors)
    path = tmp_path / f"weights{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_holds(open_weights(path), tensors)
    assert_holds(open_weights(tmp_path), tensors)


def test_parameters_and_eight_bit_floats_of_a_pickle(tmp_path):
    import torch

    values = torch.tensor([0.5, -2.0])
    content = {
        "p": torch.nn.Parameter(values.bfloat16()),
        "e4": values.to(torch.float8_e4m3fn),
        "e5": values.to(torch.float8_e5m2),
    }
    torch.save(content, tmp_path / "weights.pth")
    weights = open_weights(tmp_path / "weights.pth")
    for key, dtype in (("p", jnp.bfloat16), ("e4", jnp.float8_e4m3fn), ("e5", jnp.float8_e5m2)):
        np.testing.assert_array_equal(weights.read(key), np.array([0.5, -2], dtype), strict=True)


def test_eight_bit_floats_of_safetensors(tmp_path):
    values = {"e4": np.array([0.5, -2], jnp.float8_e4m3fn), "e5": np.array([0.5, -2], jnp.float8_e5m2)}
    save_file(values, tmp_path / "weights.safetensors")
    assert_holds(open_weights(tmp_path), values)


def test_a_manifest_has_shapes_and_no_values():
    weights = open_weights(MANIFESTS / "umt5_xxl_encoder.json")
    assert weights.specs["token_embedding.weight"].shape == (256384, 4096)
    assert weights.specs["token_embedding.weight"].dtype == jnp.bfloat16
    with pytest.raises(WeightsError, match=r"norm\.weight"):
        weights.read("norm.weight")


# Bad files: one line each


def broken_file(kind, tmp_path, tensors):
    """Writes a damaged file, and returns its path."""
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    if kind == "data cut off":
        path.write_bytes(content[:-1])
    elif kind == "header cut off":
        path.write_bytes(content[:40])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "header damaged":
        path.write_bytes(content[:20] + b"\xff" * 20 + content[40:])
    return path


@pytest.mark.parametrize("kind", ["data cut off", "header cut off", "empty", "header damaged"])
def test_damaged_safetensors(tmp_path, tensors, command, kind):
    path = broken_file(kind, tmp_path, tensors)
    code, out, err = command("inspect", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{path}: damaged" in err


def test_a_safetensors_dtype_that_is_not_supported(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(WeightsError, match="F4"):
        open_weights(tmp_path / "x.safetensors")


def test_an_index_that_names_a_missing_shard(tmp_path, tensors, command):
    write_shards(tmp_path, tensors)
    (tmp_path / "model-1.safetensors").unlink()
    code, _, err = command("inspect", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "model-1.safetensors" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names | {"gone": "model-0.safetensors"}, "gone"),
        (lambda names: {k: v for k, v in names.items() if k != "a.half"}, r"a\.half"),
        (lambda names: dict.fromkeys(names, "model-0.safetensors"), r"a\.half"),
        (lambda names: names | {"a.half": 3}, "weight_map"),
        (lambda names: list(names), "weight_map"),
    ],
)
def test_an_index_that_does_not_match_its_files(tmp_path, tensors, change, message):
    names = write_shards(tmp_path, tensors)
    write_shards(tmp_path, tensors, index=change(names))
    with pytest.raises(WeightsError, match=message):
        open_weights(tmp_path)


def test_several_files_without_an_index_are_ambiguous(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=r"model-0\.safetensors, model-1\.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("x.json", "{", "JSON"),
        ("x.json", "[]", "list"),
        ("x.json", "{}", "manifest"),
        ("x.json", '{"tensors": ["a"]}', "manifest"),
        ("x.json", '{"tensors": {"a": "wide"}}', "manifest"),
        ("x.json", '{"dtype": "float33", "tensors": {}}', "manifest"),
        ("x.model.safetensors.index.json", "[]", "list"),
        ("x.npz", "\x01\x02", "unknown"),
        ("x.pth", "", "damaged"),
        ("x.pth", "not a pickle at all", "damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path, command, name, content, word):
    (tmp_path / name).write_text(content)
    code, out, err = command("inspect", tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert name in err
    assert word in err


def test_a_truncated_pickle(tmp_path, tensors, command):
    import torch

    path = tmp_path / "x.ckpt"
    torch.save(nested(tensors), path)
    path.write_bytes(path.read_bytes()[:-400])
    code, _, err = command("inspect", path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path}: damaged" in err


class Harmful:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("writer", ["torch", "torch without zip", "pickle"])
def test_a_harmful_pickle_runs_nothing(tmp_path, command, writer):
    import torch

    marker, path = tmp_path / "ran", tmp_path / "weights.pth"
    pickle.loads(pickle.dumps(Harmful(marker)))
    assert marker.exists(), "unpickling it has an effect"
    marker.rmdir()

    content = {"weight": torch.ones(2), "harm": Harmful(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Harmful(marker)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    code, out, err = command("inspect", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": {"b": 3}}, r"a\.b is int"),
        ({"a": "text"}, "a is str"),
        ([1, 2], "list"),
        ({"model_state": 1.5}, "float"),
    ],
)
def test_a_pickle_of_other_values_than_tensors(tmp_path, content, message):
    import torch

    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        open_weights(tmp_path / "x.pth")


def test_tensors_that_would_get_the_same_key(tmp_path):
    import torch

    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"a\.b"):
        open_weights(tmp_path / "x.pth")


def test_a_sparse_tensor_is_refused(tmp_path):
    import torch

    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="dense"):
        open_weights(tmp_path / "x.pth")


def test_without_pytorch_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.pth").write_bytes(b"\x80\x02.")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"fantasy_jax\[convert\]"):
        open_weights(tmp_path / "x.pth")
