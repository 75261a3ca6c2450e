"""LoRA files of other programs: five spellings, merged and beside the weights, equal to PyTorch's sums."""

import json
import math
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from full_size import tensors
from helpers import DATA, TINY_WAN, fill, random_network, relative, run_convert_weights, to_torch
from safetensors.numpy import load_file, save_file
from test_lora import velocity

from configs import fantasy_talking_14b
from fantasy_jax.config import build
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.lora import check_lora, read_lora
from fantasy_jax.convert.rules import assign, flat_parameters
from fantasy_jax.convert.wan import official_rules
from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.models.lora import LoRASizes
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.system.registry import component_of
from fantasy_jax.weights.detect import detect
from fantasy_jax.weights.loading import StoredLoader, load_network
from fantasy_jax.weights.lora import LoRAFile, OpenLoRA, check_exist, open_loras, parse_lora
from fantasy_jax.weights.store import LORA, items, read_config, save_network

CONFIG = replace(TINY_WAN, dim=32, ffn_dim=48)
SPELLINGS = ("kohya", "comfyui", "lightx2v", "peft", "diffusers")
ATTENTION = [f"{part}_attn.{name}" for part in ("self", "cross") for name in "qkvo"]
LAYERS = [*ATTENTION, "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]
OUTSIDE = (
    *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1"),
    *("img_emb.proj.1", "img_emb.proj.3"),
)
DIFFERENCES = {
    "diff": (
        *("blocks.1.self_attn.norm_q", "blocks.0.cross_attn.norm_k_img", "blocks.2.norm3", "head.head"),
        *("img_emb.proj.0", "img_emb.proj.4", "patch_embedding"),
    ),
    "diff_b": ("blocks.0.self_attn.q", "blocks.2.norm3", "head.head", "patch_embedding", "img_emb.proj.1"),
    "diff_m": ("blocks.1", "head"),
}
TENSORS = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
DIFFERENCE_NAMES = {tensor: name for name, tensor in TENSORS.items()}


@pytest.fixture(scope="module")
def network():
    return random_network(CONFIG)


@pytest.fixture(scope="module")
def base(network):
    """The transformer as PyTorch's state dict, official keys."""
    return to_torch(network, official_rules(CONFIG))


@pytest.fixture(scope="module")
def store(network, tmp_path_factory):
    """A store of the transformer and a LoRA."""
    folder = tmp_path_factory.mktemp("store")
    save_network(folder / "transformer", network, component="wan2.1_i2v_dit")
    layers = (("blocks/self_attention/query", (3, 32, 32)), ("text_in", (24, 32)))
    save_network(folder / LORA, random_network(LoRASizes(2, 3.0, layers), seed=3), component=LORA)
    return folder


def random(seed, *shape):
    return 0.3 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def products(base, names, *, alpha):
    """Random A, B and alpha by layer, official names; each layer has another rank, and not all are there."""
    found = {}
    for seed, name in enumerate(names):
        outputs, inputs = base[f"{name}.weight"].shape
        rank = 1 + seed % 4
        number = np.float32(0.5 + seed % 3) if alpha else None
        found[name] = random(seed, rank, inputs), random(seed + 500, outputs, rank), number
    return found


def content(base, spelling):
    """Products and differences of a file; one block lacks the products of its MLP."""
    blocks = [f"blocks.{i}.{layer}" for i in range(CONFIG.num_layers) for layer in LAYERS]
    names = [name for name in blocks if not name.startswith("blocks.1.ffn")]
    names += OUTSIDE if spelling in ("comfyui", "lightx2v", "diffusers") else ()
    low_rank = products(base, names, alpha=spelling in ("kohya", "lightx2v"))
    if spelling != "lightx2v":
        return low_rank, {}
    return low_rank, {
        (name, kind): random(len(name), *base[f"{name}.{TENSORS[kind]}"].shape)
        for kind, names in DIFFERENCES.items()
        for name in names
    }


def spelled(spelling, low_rank, differences):
    """The tensors of a file."""
    names = {
        "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight"),
        "comfyui": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
        "lightx2v": ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
        "peft": ("base_model.model.", "lora_A.default.weight", "lora_B.default.weight"),
        "diffusers": ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
    }
    prefix, down, up = names[spelling]
    tensors = {f"{prefix}{name}.{kind}": value for (name, kind), value in differences.items()}
    for name, (a, b, alpha) in low_rank.items():
        stem = f"{prefix}{name.replace('.', '_') if spelling == 'kohya' else name}"
        tensors |= {f"{stem}.{down}": a, f"{stem}.{up}": b}
        tensors |= {} if alpha is None else {f"{stem}.alpha": np.asarray(alpha)}
    return by_diffusers(tensors) if spelling == "diffusers" else tensors


def by_diffusers(tensors):
    """The same file in diffusers' names, by diffusers."""
    import torch
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    converted = _convert_non_diffusers_wan_lora_to_diffusers(
        {key: torch.from_numpy(value) for key, value in tensors.items()}
    )
    return {key: value.numpy() for key, value in converted.items()}


def by_hand(state, low_rank, differences, strength):
    """The state dict with a LoRA, added in PyTorch."""
    import torch

    state = dict(state)
    for name, (a, b, alpha) in low_rank.items():
        scale = 1.0 if alpha is None else float(alpha) / len(a)
        state[f"{name}.weight"] = state[f"{name}.weight"] + strength * scale * torch.from_numpy(b @ a)
    for (name, kind), value in differences.items():
        key = f"{name}.{TENSORS[kind]}"
        state[key] = state[key] + strength * torch.from_numpy(value)
    return state


def write(path, tensors):
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return str(path)


def opened(folder, network, tensors, strength=1.0):
    weights = open_weights(write(folder / "x.safetensors", tensors))
    return OpenLoRA(check_lora(read_lora(weights, CONFIG, flat_parameters(network)), CONFIG), strength)


def loaded(store, files, *, merge_lora=True):
    load = StoredLoader(store, merge_lora=merge_lora, loras=open_loras(files, CONFIG))
    return load(component_of(CONFIG), CONFIG, jnp.dtype("float32"), None)


@cache
def stored_items():
    return items(component_of(CONFIG), CONFIG)


def merged(network, lora, **options):
    """All parameters by path, changed by a LoRA's hook item by item, as they are while loading."""
    values = {path: np.array(value) for path, value in flat_parameters(network).items()}
    merge = lora.merge(**options)
    for item, places in stored_items().items():
        index = {path: ... if layer is None else layer for path, layer in places.items()}
        changed = merge(item, {path: values[path][i] for path, i in index.items()})
        for path, i in index.items():
            values[path][i] = changed[path]
    return values


def with_products(network):
    """All parameters, with the products that lie beside the kernels added to them."""
    values = {path: np.asarray(value) for path, value in flat_parameters(network).items()}
    for path in [path for path in values if path.endswith("/dot_general/lora_a")]:
        layer = path.removesuffix("/dot_general/lora_a")
        a, b = values.pop(path), values.pop(f"{layer}/dot_general/lora_b")
        values[f"{layer}/kernel"] = values[f"{layer}/kernel"] + a @ b
    return values


def changed_network(network, values):
    """A copy of the network with these parameters."""
    copy = nnx.clone(network)
    assign(copy, values)
    return copy


def expected(network, state):
    """All parameters by path, of a PyTorch state dict."""
    return flat_parameters(fill(nnx.clone(network), official_rules(CONFIG), state))


def check_equal(values, wanted, limit=2e-6):
    assert values.keys() == wanted.keys()
    for path, value in wanted.items():
        assert relative(values[path], value) < limit, path


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_merged_and_beside_equal_the_sum_in_pytorch(network, base, tmp_path, spelling):
    low_rank, differences = content(base, spelling)
    lora = opened(tmp_path, network, spelled(spelling, low_rank, differences), 0.7)
    assert lora.tensors.spelling == spelling
    wanted = expected(network, by_hand(base, low_rank, differences, 0.7))
    check_equal(merged(network, lora), wanted)
    beside = changed_network(network, merged(network, lora, products=False))
    lora.attach(beside)
    assert beside.blocks.mlp_in.dot_general is not network.blocks.mlp_in.dot_general
    check_equal(with_products(beside), wanted)


@pytest.mark.slow
def test_several_files_and_the_lora_of_the_store_add_up(store, network, base, tmp_path):
    state, files = base, []
    for spelling, strength in (("peft", 1.0), ("lightx2v", -0.5)):
        parts = content(base, spelling)
        path = write(tmp_path / f"{spelling}.safetensors", spelled(spelling, *parts))
        state, files = by_hand(state, *parts, strength), [*files, LoRAFile(path, strength)]
    wanted = dict(expected(network, state))
    stored = load_network(store / LORA, read_config(store / LORA)[1], dtype=jnp.float32)
    for path, product in stored.products().items():
        wanted[f"{path}/kernel"] += 1.5 * product.lora_a[...] @ product.lora_b[...]
    check_equal(flat_parameters(loaded(store, files)), wanted)
    beside = loaded(store, files, merge_lora=False)
    check_equal(with_products(beside), wanted)
    query = beside.blocks.self_attention.query.dot_general
    assert query.lora_a.shape[-1] == query.config.rank == query.config.alpha


@pytest.mark.slow
def test_the_velocity_is_the_same_merged_and_beside(store, network, base, tmp_path):
    parts = content(base, "lightx2v")
    files = [LoRAFile(write(tmp_path / "x.safetensors", spelled("lightx2v", *parts)), 0.7)]
    (tmp_path / "transformer").symlink_to(store / "transformer")
    both = [velocity(loaded(tmp_path, files, merge_lora=merge)) for merge in (True, False)]
    wanted = velocity(changed_network(network, expected(network, by_hand(base, *parts, 0.7))))
    assert all(relative(found, wanted) < 2e-6 for found in both)
    assert relative(velocity(network), wanted) > 0.01


@pytest.mark.parametrize(
    ("settings", "word"), [({"lora_alpha": "8"}, "'8'"), ({"alpha_pattern": {"q": 3}}, "pattern")]
)
def test_settings_of_peft_that_cannot_be_used(network, base, tmp_path, settings, word):
    path = write(tmp_path / "adapter_model.safetensors", wrong(base))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lora = OpenLoRA(read_lora(open_weights(path), CONFIG, flat_parameters(network)), 1.0)
    with pytest.raises(WeightsError, match=word):
        merged(network, lora)


@pytest.mark.parametrize(("spelling", "settings"), [("peft", "beside"), ("diffusers", "inside")])
def test_alpha_in_the_settings_of_peft(network, base, tmp_path, spelling, settings):
    """peft writes it beside the file, diffusers into it; a key of the file would take precedence."""
    low_rank = products(base, ["blocks.0.ffn.0", "blocks.1.ffn.0"], alpha=False)
    tensors, alpha = spelled(spelling, low_rank, {}), {"lora_alpha": 5, "r": 1}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": x for k, x in alpha.items()})}
    path = tmp_path / "adapter_model.safetensors"
    save_file(tensors, path, metadata if settings == "inside" else None)
    if settings == "beside":
        path.with_name("adapter_config.json").write_text(json.dumps(alpha))
    (lora,) = open_loras([LoRAFile(str(path))], CONFIG)
    with_alpha = {name: (a, b, np.float32(5)) for name, (a, b, _) in low_rank.items()}
    check_equal(merged(network, lora), expected(network, by_hand(base, with_alpha, {}, 1.0)))


def test_patches_of_a_file_for_text_alone_and_a_modulation_in_names_for_comfyui(network, base, tmp_path):
    patches = random(0, 32, CONFIG.latent_channels, 1, 2, 2)
    padded = np.pad(patches, [(0, 0), (0, CONFIG.condition_channels), (0, 0), (0, 0), (0, 0)])
    modulation, low_rank = random(1, 1, 6, 32), products(base, ["blocks.0.cross_attn.k"], alpha=False)
    written = {("patch_embedding", "diff"): patches, ("blocks.1.modulation", "diff"): modulation}
    added = {("patch_embedding", "diff"): padded, ("blocks.1", "diff_m"): modulation}
    lora = opened(tmp_path, network, spelled("comfyui", low_rank, written))
    check_equal(merged(network, lora), expected(network, by_hand(base, low_rank, added, 1.0)))


def test_a_product_of_convolutions_is_merged(network, base, tmp_path):
    shape = base["patch_embedding.weight"].shape
    a, b = random(0, 3, *shape[1:]), random(1, shape[0], 3, 1, 1, 1)
    lora = opened(tmp_path, network, spelled("comfyui", {"patch_embedding": (a, b, None)}, {}), 0.7)
    product = np.tensordot(b[..., 0, 0, 0], a, 1)
    wanted = expected(network, by_hand(base, {}, {("patch_embedding", "diff"): product}, 0.7))
    check_equal(merged(network, lora, products=False), wanted)
    assert lora.changed(products=False) == lora.changed()


def test_the_own_export_is_read_back_equal(store, tmp_path, capsys):
    def export(component, *options):
        path = tmp_path / f"{component}{len(options)}.safetensors"
        arguments = ("--weights", store, "--component", component, "--output", path)
        code, _, errors = run_convert_weights(capsys, "export", *arguments, *options)
        assert code == 0, errors
        return path

    file = export(LORA)
    by_store, by_file = (load_file(export("transformer", x)) for x in ("--merge_lora", f"--lora={file}"))
    assert by_file.keys() == by_store.keys()
    plain = load_file(export("transformer"))
    changed = {key for key, value in plain.items() if (value != by_file[key]).any()}
    assert changed == {*(f"blocks.{i}.self_attn.q.weight" for i in range(3)), "text_embedding.0.weight"}
    for key, value in by_store.items():
        assert relative(by_file[key], value) < 2e-6, key


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_inspect_names_each_spelling(base, tmp_path, capsys, spelling):
    tensors = spelled(spelling, *content(base, spelling))
    path = write(tmp_path / "x.safetensors", tensors)
    (tmp_path / "config.json").write_text((DATA / "fantasytalking_dit/config.json").read_text())
    code, out, _ = run_convert_weights(capsys, "inspect", path)
    assert f"component   lora, {spelling} keys, sizes of config.json\n" in out
    assert code == 1  # the reference has another width
    assert "wrong shape" in out
    assert "width       32\n" in out
    assert f"tensors     {len(tensors)}\n" in out


def wrong(base, **changes):
    """A file of one product, with tensors changed, added, or with None removed."""
    tensors = spelled("comfyui", products(base, ["blocks.0.ffn.0"], alpha=False), {})
    return {k: x for k, x in (tensors | changes).items() if x is not None}


KEY = "diffusion_model.blocks.0.ffn.0.lora_{}.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"unknown.{i}": np.ones(2) for i in range(9)}, r"unknown.0 is of no known kind; .*; and 6 more"),
        ({"blocks.0.ffn.7.diff_b": np.ones(2)}, r"blocks.0.ffn.7.bias \[2\] matches no parameter"),
        ({"lora_te_text_model.lora_up.weight": np.ones((2, 2))}, "no matching lora_A and lora_B"),
        ({"blocks.3.ffn.0.diff_b": np.ones(48)}, "3 blocks: .* is for layer 3"),
        ({KEY.format("B"): None}, "no matching lora_A and lora_B"),
        ({KEY.format("B"): np.ones((48, 7), np.float32)}, "cannot be multiplied"),
        ({"blocks.0.ffn.0.lora_down.weight": np.ones((1, 32))}, "are for the same layer"),
        ({"blocks.0.ffn.0.alpha": np.ones(2)}, "is not a number"),
        ({KEY.format("A"): np.ones((1, 32), np.int8), KEY.format("B"): np.ones((48, 1), np.int8)}, "int8"),
        ({KEY.format(x): None for x in "AB"} | {"x": np.ones(2)}, "is no LoRA"),
    ],
)
def test_what_does_not_fit_is_one_line(network, base, tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message) as error:
        opened(tmp_path, network, wrong(base, **changes))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_lora_of_another_width_is_said_as_such(network, tmp_path):
    tensors = {
        f"diffusion_model.blocks.{i}.self_attn.{x}.lora_{y}.weight": np.ones(size, np.float32)
        for i in range(30)
        for x in "qkvo"
        for y, size in {"A": (2, 1536), "B": (1536, 2)}.items()
    }
    with pytest.raises(
        WeightsError, match=r"for a transformer of width 1536 \(Wan2.1 1.3B\); this one has width 32$"
    ):
        opened(tmp_path, network, tensors)


def test_a_lora_is_no_network_to_import(base, tmp_path):
    path = write(tmp_path / "x.safetensors", wrong(base))
    with pytest.raises(WeightsError, match="is a LoRA"):
        detect(open_weights(path))


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("b/a:0.5", "b/a", 0.5),
        ("C:a:-1", "C:a", -1.0),
        ("C:a", "C:a", 1.0),
    ],
)
def test_a_file_and_its_strength(text, path, strength):
    assert parse_lora(text) == LoRAFile(path, strength)


@pytest.mark.parametrize("text", ["", "a:1e9", "a:nan"])
def test_a_wrong_file_or_strength(text):
    with pytest.raises(ConfigError, match=r"^lora"):
        parse_lora(text)


def test_the_fast_variant_says_how_its_file_is_fetched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sample = build(SampleConfig, fantasy_talking_14b.get_config("fast").sample, "sample")
    assert [branch.dropped for branch in sample.guidance] == [("audio",), ()]
    assert sampling_sigmas(4, sample.shift) == pytest.approx([1, 0.9375, 0.8333, 0.625, 0], abs=1e-4)
    with pytest.raises(
        WeightsError, match=r"download --component=lora --output=downloads` .*--lora=FILE"
    ) as error:
        check_exist(sample.loras)
    assert "\n" not in str(error.value)


def full_size_file():
    """Names and shapes of a file as LightX2V extracts it: products of large matrices, and differences."""
    shapes = {}
    for key, shape in tensors("wan2.1_i2v_14b_dit").items():
        stem, _, kind = key.rpartition(".")
        if kind == "weight" and len(shape) == 2 and math.prod(shape) >= 1_000_000:
            shapes |= {f"{stem}.lora_down.weight": [64, shape[1]], f"{stem}.lora_up.weight": [shape[0], 64]}
        else:
            shapes[f"{stem}.{DIFFERENCE_NAMES[kind]}"] = shape
    return {f"diffusion_model.{key}": shape for key, shape in shapes.items()}


@pytest.mark.networks
def test_a_file_of_the_full_size_maps_completely(tmp_path, capsys):
    path = tmp_path / "lightx2v.json"
    path.write_text(json.dumps({"tensors": full_size_file()}))
    code, out, _ = run_convert_weights(capsys, "inspect", path)
    assert code == 0
    assert "component   lora, lightx2v keys, sizes of wan2.1_i2v_14b\n" in out
    assert "products    487 of rank 64; 0 with alpha\n" in out
    assert "width       5120 (Wan2.1 14B)\n" in out
    assert out.endswith("complete\n")


def test_a_pipeline_with_a_file(tmp_path):
    """The bundled weights, changed in one norm."""
    networks = FantasyTalkingPipeline.from_pretrained().networks
    scale = np.linspace(-1, 1, networks.config.transformer.dim, dtype=np.float32)
    path = write(tmp_path / "x.safetensors", {"blocks.0.self_attn.norm_q.diff": scale})
    pipeline = FantasyTalkingPipeline.from_pretrained(loras=[f"{path}:0.5"])
    assert pipeline.config.loras == (LoRAFile(path, 0.5),)
    assert pipeline.origins["LoRA file 1"].startswith("x.safetensors, strength 0.5, ")
    place = "blocks/self_attention/query_norm/scale"
    plain = flat_parameters(networks["transformer"])[place][0]
    found = flat_parameters(pipeline.networks["transformer"])[place][0]
    np.testing.assert_allclose(found, plain + 0.5 * scale, rtol=1e-6)
