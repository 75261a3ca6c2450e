"""The middle layer: sizes of a system, its networks by slot, and the inputs of clips."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal
from systems import full_model

from configs.fantasy_talking_14b import small_model
from fantasy_jax.config import as_json, build, to_config_dict
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.data.encoded import batch_spec, encode_records
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.pipelines.base import Pipeline
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.sharding import MeshConfig, make_mesh
from fantasy_jax.system.encoders import encode_first_frame
from fantasy_jax.system.inputs import ClipInputs, first_frame_condition
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks, abstract_networks, random_networks
from fantasy_jax.system.registry import component_of, components, find_component, slots
from fantasy_jax.video import VideoConfig

VIDEO = VideoConfig(height=32, width=48, num_frames=9)
MESH = MeshConfig(fsdp=2, context=2, tensor=2)


# Sizes


def test_a_model_has_networks_by_slot():
    model = small_model()
    assert model.transformer.dim == 48
    assert model.vae == model.networks["vae"]
    assert model.motion_adapter is None
    assert model.motion_encoder is None
    assert list(model.adapters) == ["audio"]
    assert list(full_model().adapters) == ["audio", "motion", "identity"]
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense


def test_models_are_equal_by_their_sizes():
    model = small_model()
    assert model == small_model()
    assert hash(model) == hash(small_model())
    assert model != model.replace(dtype="bfloat16")
    assert model != full_model()
    added = ("motion_adapter", "identity_adapter", "face_encoder", "motion_encoder")
    same = full_model().replace(**dict.fromkeys(added))
    assert same == model
    assert model.replace(dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize("model", [small_model(), full_model(), full_model().replace(dtype="bfloat16")])
def test_a_model_is_built_from_its_config(model):
    section = to_config_dict({"model": model}).model
    assert section.transformer.component == "wan2.1_i2v_dit"
    assert build(ModelConfig, section, "model") == model
    assert ModelConfig.from_config(as_json(model), "model") == model
    section.vae.dim = 16
    assert build(ModelConfig, section, "model").vae.dim == 16


def test_a_network_that_is_none_in_a_config_is_left_out():
    section = as_json(full_model()) | {"motion_adapter": None}
    assert ModelConfig.from_config(section, "model") == full_model().replace(motion_adapter=None)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vae": {"component": "nonsense"}}, r"^model\.vae\.component.*nonsense"),
        ({"vae": {"dim": 8}}, r"^model\.vae\.component"),
        ({"vae": {"component": "wan_vae", "dims": 8}}, r"^model\.vae\.dims"),
        ({"vae": {"component": "wan_vae", "dim": "eight"}}, r"^model\.vae\.dim"),
        ({"vae": {"component": "umt5_encoder"}}, r"^model\.vae.*umt5_encoder"),
        ({"nonsense": {"component": "motion_adapter"}}, r"^model\.nonsense"),
        ({"vae": None}, r"^model\.transformer.*vae"),
        ({"text_encoder": None}, r"^model\.transformer.*text_encoder"),
        ({"dtype": "float16"}, r"^model\.dtype"),
    ],
)
def test_config_error_names_the_path(changes, named):
    with pytest.raises(ConfigError, match=named) as caught:
        ModelConfig.from_config(as_json(small_model()) | changes, "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("slot", "changes", "named"),
    [
        ("audio_adapter", {"width": 64}, "audio_adapter.width"),
        ("audio_adapter", {"num_layers": 3}, "audio_adapter.num_layers"),
        ("audio_adapter", {"num_heads": 2}, "audio_adapter.num_heads"),
        ("audio_adapter", {"feature_width": 8}, "audio_adapter.feature_width"),
        ("motion_adapter", {"width": 8}, "motion_adapter.width"),
        ("identity_adapter", {"feature_width": 5}, "identity_adapter.feature_width"),
        ("text_encoder", {"dim": 64}, "transformer.text_dim"),
        ("image_encoder", {"dim": 64}, "transformer.image_dim"),
        ("transformer", {"latent_channels": 8}, "transformer.latent_channels"),
        ("transformer", {"condition_channels": 16}, "transformer.condition_channels"),
    ],
)
def test_config_error_names_both_sizes_that_must_be_equal(slot, changes, named):
    model = full_model()
    changed = replace(model.networks[slot], **changes)
    with pytest.raises(ConfigError) as caught:
        model.replace(**{slot: changed})
    (value,) = changes.values()
    message = str(caught.value)
    assert message.startswith(named)
    assert f"({value})" in message
    other = find_component(component_of(model.networks[named.split(".")[0]]).name).equal[named.split(".")[1]]
    assert other in message


def test_config_error_for_a_network_in_another_slot():
    with pytest.raises(ConfigError, match="vae"):
        ModelConfig(vae=WanConfig())


def test_every_component_belongs_to_one_config_type_and_a_slot():
    rows = components().values()
    for row in rows:
        config = next(iter(row.presets.values()))
        assert component_of(config) is row
        assert find_component(row.name) is row
        assert row.slot in slots()
        for other in (row.equal or {}).values():
            assert other.split(".")[0] in slots()
    with pytest.raises(ConfigError, match="VideoConfig"):
        component_of(VIDEO)


# Networks


class CountingLoader:
    """Makes networks without memory, and counts how often each is made."""

    def __init__(self):
        self.made = Counter()

    def __call__(self, component, config, dtype, mesh):
        self.made[component.slot] += 1
        return component.abstract(config, dtype)


def counted():
    loader = CountingLoader()
    return Networks(small_model(), loader, byte_tokenizer), loader.made


def test_networks_are_a_mapping_by_slot():
    networks, made = counted()
    assert list(networks) == list(small_model().networks)
    assert len(networks) == 6
    assert "vae" in networks
    assert "motion_adapter" not in networks
    assert not made
    with pytest.raises(KeyError):
        networks["motion_adapter"]
    assert networks.tokenizer("a")["input_ids"] == [100, 1]


def test_the_transformer_has_its_adapters():
    networks = Networks(full_model(), CountingLoader(), byte_tokenizer)
    assert sorted(networks["transformer"].adapters) == ["audio", "identity", "motion"]


def test_a_network_is_made_in_the_systems_dtype_or_in_its_own():
    networks = Networks(full_model().replace(dtype="bfloat16"), CountingLoader(), byte_tokenizer)
    dtypes = {
        slot: {x.dtype for x in jax.tree.leaves(nnx.state(networks[slot], nnx.Param))} for slot in networks
    }
    for slot in ("face_encoder", "motion_encoder"):
        assert dtypes.pop(slot) == {jnp.dtype("float32")}
    assert set.union(*dtypes.values()) == {jnp.dtype("bfloat16")}


def test_the_vae_has_the_type_of_the_sampling_settings():
    networks, made = counted()
    config = PipelineConfig(vae_dtype="bfloat16")
    changed = Pipeline(networks, VIDEO, config, keep="all").networks
    types = {
        slot: {x.dtype for x in jax.tree.leaves(nnx.state(changed[slot], nnx.Param))} for slot in networks
    }
    assert types.pop("vae") == {jnp.dtype("bfloat16")}
    assert set.union(*types.values()) == {jnp.dtype("float32")}
    assert networks["vae"].moments.dtype == jnp.float32
    made.clear()
    exact = changed.with_dtypes(vae="float32", transformer=None)
    assert exact["vae"].moments.dtype == jnp.float32
    assert exact["transformer"] is changed["transformer"]
    assert made == {"vae": 1}


def test_no_network_is_kept_unless_asked():
    networks, made = counted()
    for _ in range(2):
        networks["vae"], networks["transformer"]
    assert made == {"vae": 2, "transformer": 2, "audio_adapter": 2}


def test_the_transformer_alone_is_kept():
    networks, made = counted()
    networks = networks.keeping("transformer")
    for _ in range(2):
        networks["vae"], networks["transformer"]
    assert made == {"vae": 2, "transformer": 1, "audio_adapter": 1}
    assert networks["transformer"] is networks["transformer"]


def test_all_networks_are_kept():
    networks, made = counted()
    networks = networks.keeping("all")
    for _ in range(2):
        networks["vae"], networks["transformer"]
    assert networks["transformer"].adapters["audio"] is networks["audio_adapter"]
    assert made == {"vae": 1, "transformer": 1, "audio_adapter": 1}


def test_given_networks_replace_those_of_the_loader():
    networks, made = counted()
    vae, adapter = (networks[slot] for slot in ("vae", "audio_adapter"))
    made.clear()
    replaced = networks.replace(vae=vae, audio_adapter=adapter)
    assert replaced["vae"] is vae
    assert replaced["transformer"].adapters["audio"] is adapter
    assert made == {"transformer": 1}
    assert replaced.replace(transformer=replaced["transformer"])["vae"] is vae
    assert networks["vae"] is not vae
    kept = networks.keeping("all")
    assert kept["transformer"].adapters["audio"] is not adapter
    assert kept.replace(audio_adapter=adapter)["transformer"].adapters["audio"] is adapter
    assert kept.replace(vae=vae)["transformer"] is kept["transformer"]


def test_on_one_device_the_networks_stay_as_they_are():
    networks, _ = counted()
    with networks.on_mesh(MeshConfig(fsdp=1)) as same:
        assert same is networks
        assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.slow
def test_on_a_mesh_the_networks_are_sharded():
    model = small_model()
    networks = random_networks(model, byte_tokenizer(), seed=3).keeping("all")
    whole = networks["text_encoder"]
    mesh = make_mesh(**MESH.axes)
    with networks.on_mesh(replace(MESH, context_parallelism="gather"), mesh) as sharded:
        assert jax.sharding.get_abstract_mesh().size == 8
        encoder = sharded["text_encoder"]
        assert encoder is not whole
        assert encoder is sharded["text_encoder"]  # kept, too
        assert sharded["transformer"].context_parallelism == "gather"
        with sharded.on_mesh(MESH, mesh) as same:
            assert same is sharded
    assert jax.sharding.get_abstract_mesh().empty
    assert networks["text_encoder"] is whole
    for path, value in flat_parameters(encoder).items():
        np.testing.assert_array_equal(value, flat_parameters(whole)[path], err_msg=path)
    kernel = encoder.blocks.query.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 16)


def test_abstract_networks_have_shardings_and_no_memory():
    networks = abstract_networks(small_model(), make_mesh(**MESH.axes), MESH)
    kernel = networks["transformer"].blocks.self_attention.query.kernel
    assert isinstance(kernel.get_value(), jax.ShapeDtypeStruct)
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 24, 24)
    assert list(networks["transformer"].adapters) == ["audio"]


def test_random_networks_depend_on_the_seed_only():
    model = small_model()
    values = [
        flat_parameters(random_networks(model, byte_tokenizer(), seed=seed)["audio_adapter"])[
            "projection/kernel"
        ]
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(values[0], values[1])
    assert not np.array_equal(values[0], values[2])


def test_config_error_for_a_tokenizer_with_more_tokens_than_the_text_encoder():
    model = small_model()
    model = model.replace(text_encoder=replace(model.text_encoder, vocab_size=100))
    with pytest.raises(ConfigError, match=r"model\.text_encoder\.vocab_size"):
        random_networks(model, byte_tokenizer())


# Inputs


@pytest.mark.parametrize("model", [small_model(), full_model()])
def test_the_spec_of_inputs_has_the_shapes_of_a_batch(model):
    spec = ClipInputs.spec(model, VIDEO, 2)
    batch = batch_spec(model, VIDEO, 2)
    empty = np.zeros((1, model.transformer.text_length, model.text_encoder.dim), np.float32)
    inputs = jax.eval_shape(lambda batch: ClipInputs.from_batch(batch, empty), batch)
    people = inputs.labels, inputs.owners  # which sampling has for several people only
    if model.motion_encoder is None:
        assert people == (None, {})
    else:
        assert [x.shape for x in jax.tree.leaves(people)] == [(2, 3, 6), (2, 1)]
    shapes = [jax.tree.map(lambda x: x.shape, x) for x in (spec, replace(inputs, labels=None, owners={}))]
    assert shapes[0] == shapes[1]
    assert set(spec.adapters) == {row.network.input for row in model.adapters.values()}
    assert spec.first_frame.shape == (2, 3, 4, 6, 20)
    tokens = VIDEO.audio_tokens
    assert spec.adapters["audio"].shape == (2, tokens, model.audio_adapter.feature_width)


def test_inputs_of_records_are_those_of_a_padded_batch():
    random = np.random.default_rng(0)
    shapes = {"latents": (3, 4, 6, 16), "first_frame": (3, 4, 6, 16), "image": (5, 32), "audio": (9, 24)}
    records = [
        {name: random.random(shape).astype(np.float16) for name, shape in shapes.items()}
        | {"text": random.random((length, 32)).astype(np.float16), "waveform": np.zeros(9, np.int16)}
        for length in (3, 5)
    ]
    empty = np.ones((1, 2, 32), np.float32)
    inputs = ClipInputs.from_records(records, empty)
    assert set(inputs.adapters) == {"audio"}
    assert {x.dtype for x in jax.tree.leaves(inputs)} == {jnp.dtype("float32")}
    assert inputs.text.shape == (2, 5, 32)
    assert not inputs.text[0, 3:].any()
    np.testing.assert_array_equal(inputs.text[1], records[1]["text"])
    np.testing.assert_array_equal(inputs.negative_text, np.ones((2, 2, 32)))
    np.testing.assert_array_equal(inputs.adapters["audio"][1], records[1]["audio"])
    latents = jnp.stack([record["first_frame"] for record in records]).astype(jnp.float32)
    np.testing.assert_array_equal(inputs.first_frame, first_frame_condition(latents))


def test_the_first_frame_condition_is_a_mask_and_latents():
    latents = normal(2, 3, 4, 5, 6, seed=0)
    both = first_frame_condition(latents)
    np.testing.assert_array_equal(both[..., 4:], latents)
    assert np.all(both[:, 0, ..., :4] == 1)
    assert not both[:, 1:, ..., :4].any()


@pytest.mark.slow
def test_the_image_itself_follows_the_first_frame_of_a_still_condition():
    model = small_model()
    model = model.replace(transformer=replace(model.transformer, still_condition=True))
    networks = random_networks(model, byte_tokenizer())
    record = {
        "video": np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3)).astype(np.uint8),
        "waveform": np.zeros(9 * 640, np.int16),
        "prompt": "A person talks.",
    }
    (encoded,) = encode_records(networks, [record])
    image = from_uint8(record["video"][:1])
    wanted = networks["vae"].encode(jnp.stack(9 * [image], axis=1))
    for found in (encoded["first_frame"][None], encode_first_frame(networks, image, 9)):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
