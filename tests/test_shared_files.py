"""Files that several networks share: each network gets its own tensors, and all are imported."""

import json

import numpy as np
import pytest
from helpers import DATA, as_float32, run_convert_weights
from safetensors.numpy import load_file, save_file

from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import export, flat_parameters
from fantasy_jax.weights.detect import detect

MOTION = "pdfgc_motion_encoder"
SLOTS = {
    "fantasytalking": "audio_adapter",
    "fantasyportrait_adapter": "expression_adapter",
    MOTION: "motion_encoder",
}
OPTIONS = {"fantasytalking": "fantasytalking", "fantasyportrait_adapter": "fantasyportrait", MOTION: "pd_fpg"}


@pytest.fixture(scope="module", params=["fantasytalking", "fantasyportrait_adapter"])
def adapter(request):
    """An adapter's name; FantasyPortrait's is the one that ComfyUI's file holds."""
    return request.param


@pytest.fixture(scope="module")
def reference(adapter):
    """The folder of the adapter's reference."""
    return DATA / ("fantasytalking_dit" if adapter == "fantasytalking" else "fantasyportrait_dit")


@pytest.fixture(scope="module")
def networks(adapter, reference):
    """Tensors of the adapter under ComfyUI's keys, and of a motion encoder under its official ones."""
    found = next(x for x in detect(open_weights(reference)) if x.component.name == adapter)
    comfyui = next(x for x in found.component.layouts if x.name == "comfyui")
    tensors = export(comfyui.rules(found.config), flat_parameters(found.load()))
    motion = load_file(DATA / MOTION / "weights.safetensors")
    return {adapter: {key: np.array(value, order="C") for key, value in tensors}, MOTION: motion}


@pytest.fixture
def file(tmp_path, networks, adapter, reference):
    """A file of both, as ComfyUI's of FantasyPortrait: the adapter without a prefix."""
    motion = {f"pd_fpg.{key}": value for key, value in networks[MOTION].items()}
    save_file(networks[adapter] | motion, tmp_path / "both.safetensors")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (reference, DATA / MOTION)]
    (tmp_path / "config.json").write_text(json.dumps(configs[0] | configs[1]))
    return tmp_path / "both.safetensors"


@pytest.fixture
def command(capsys):
    """Runs `convert_weights.py import`; returns exit code, standard output and the last line of errors."""

    def run(*arguments):
        code, out, err = run_convert_weights(capsys, "import", *arguments)
        return code, out, err.splitlines()[-1] if err else ""

    return run


def assert_holds(found, tensors):
    plan = found.plan()[1]
    assert plan.problems == []
    assert found.weights.specs.keys() == tensors.keys()
    for key, value in export(found.rules, flat_parameters(found.load())):
        np.testing.assert_array_equal(value, as_float32(tensors[key]), strict=True)


def test_a_network_without_a_prefix_does_not_get_the_keys_of_another(file, networks, adapter):
    found = detect(open_weights(file))
    assert [(x.component.name, x.layout.name) for x in found] == [(adapter, "comfyui"), (MOTION, "official")]
    for network in found:
        assert_holds(network, networks[network.component.name])


@pytest.mark.parametrize("key", ["other.weight", "pd_fpg.other.weight"])
def test_other_tensors_are_problems_of_one_network(file, key, adapter):
    save_file(load_file(file) | {key: np.zeros(2, np.float32)}, file)
    problems = {x.component.name: x.plan()[1].problems for x in detect(open_weights(file))}
    (problem,) = problems.pop(MOTION if "pd_fpg" in key else adapter)
    assert (problem.kind, problem.key) == ("unexpected", key.removeprefix("pd_fpg."))
    assert list(problems.values()) == [[]]


def test_other_tensors_are_problems_of_the_first_of_networks_with_prefixes(tmp_path):
    weights = load_file(DATA / "fantasytalking_dit" / "weights.safetensors")
    save_file(weights | {"other.weight": np.zeros(2, np.float32)}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text((DATA / "fantasytalking_dit" / "config.json").read_text())
    first, second = (x.plan()[1].problems for x in detect(open_weights(tmp_path)))
    assert [x.key for x in first] == ["other.weight"]
    assert second == []


@pytest.mark.parametrize("first", ["adapter", "motion encoder"])
def test_all_networks_of_a_file_are_imported_the_wanted_one_first(tmp_path, file, command, adapter, first):
    order = [adapter, MOTION] if first == "adapter" else [MOTION, adapter]
    code, out, _ = command(f"--{OPTIONS[order[0]]}", file, "--output", tmp_path / "store")
    assert code == 0
    places = [str(tmp_path / "store" / SLOTS[name]) for name in order]
    assert [line.split(":")[0] for line in out.splitlines()] == places
    again = command(f"--{OPTIONS[order[0]]}", file, "--output", tmp_path / "store")
    assert again[1].count("already complete") == 2


def test_a_file_without_the_wanted_network_is_an_error(tmp_path, file, command, adapter):
    code, out, err = command("--wav2vec2", file, "--output", tmp_path / "store")
    assert (code, out) == (2, "")
    assert f"{file}: holds {adapter} and {MOTION}, not wav2vec2" in err
    assert not (tmp_path / "store").exists()


def test_the_same_network_in_two_files_is_an_error(tmp_path, file, command, adapter):
    motion = DATA / MOTION / "weights.safetensors"
    sources = [f"--{OPTIONS[adapter]}", file, "--pd_fpg", motion]
    code, out, err = command(*sources, "--output", tmp_path / "store")
    assert (code, out) == (2, "")
    assert f"{motion}: holds the motion_encoder, as does {file}" in err
    assert not (tmp_path / "store").exists()
