"""The cost of a new adapter: this file defines one, and does with it whatever is done with the others."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, small_networks
from safetensors.numpy import load_file

from configs.fantasy_talking_14b import small_model
from fantasy_jax.convert.rules import LINEAR, Rule
from fantasy_jax.data.encoded import as_stored, batch_spec, features
from fantasy_jax.data.records import write_dataset
from fantasy_jax.diffusion.guidance import guidance_branches
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.models.adapters.base import Adapter
from fantasy_jax.models.condition import Condition, zero_init_kv_layers
from fantasy_jax.performance.programs import sampling_programs, training_programs
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.sharding import make_mesh
from fantasy_jax.system import registry
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.registry import Component, Layout, component_of
from fantasy_jax.training.finetune import finetune
from fantasy_jax.training.loop import LoopConfig
from fantasy_jax.training.objective import StageConfig, dropout_groups
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.exporter import export_weights
from fantasy_jax.weights.loading import stored_networks
from fantasy_jax.weights.store import record_hashes, save_network

VIDEO = VideoConfig(height=32, width=32, num_frames=5)


@dataclass(frozen=True)
class MoodAdapterConfig:
    """Sizes of the adapter."""

    feature_width: int = 6
    token_width: int = 8
    width: int = 48
    num_heads: int = 4
    num_layers: int = 2


class MoodAdapter(Adapter):
    """A vector of moods as one token."""

    input = "mood"
    dropout_group = "mood"

    def __init__(self, config: MoodAdapterConfig, *, rngs, dtype=jnp.float32, param_dtype=jnp.float32):
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.projection = nnx.Linear(config.feature_width, config.token_width, use_bias=False, **types)
        sizes = (config.token_width, config.width, config.num_heads, config.num_layers)
        self.layers = zero_init_kv_layers(*sizes, **types)

    @classmethod
    def input_shape(cls, config, video):
        return (config.feature_width,)

    def condition(self, features, num_frames, *, scale=1.0):
        return Condition(self.projection(features)[:, None], scale=scale)


def mood_rules(config: MoodAdapterConfig) -> list[Rule]:
    return [
        Rule("projection.weight", "projection/kernel", LINEAR),
        *(Rule(f"blocks.{{layer}}.{x}.weight", f"layers/{x}/kernel", LINEAR) for x in ("key", "value")),
    ]


@pytest.fixture(autouse=True)
def mood_adapter() -> Iterator[None]:
    registry.components()
    registry.register(
        Component(
            "mood_adapter",
            "mood_adapter",
            MoodAdapter,
            {"mood_adapter": MoodAdapterConfig()},
            lambda values: MoodAdapterConfig(**values),
            (Layout("official", ("projection.weight", "blocks.0.key.weight"), mood_rules),),
            equal={
                "width": "transformer.dim",
                **{x: f"transformer.{x}" for x in ("num_heads", "num_layers")},
            },
            adapter="mood",
        )
    )
    yield
    registry.components().pop("mood_adapter")


def model():
    return small_model().replace(mood_adapter=MoodAdapterConfig())


def write_store(directory, model):
    """A store of random weights, without the new adapter."""
    networks = small_networks(model)
    for slot, config in model.networks.items():
        if slot != "mood_adapter":
            save_network(directory / slot, networks[slot], component=component_of(config).name)
    return directory


def write_records(directory, model, vae_hash):
    """Encoded clips of random numbers."""
    rng = np.random.default_rng(0)
    shapes = {name: spec.shape[1:] for name, spec in batch_spec(model, VIDEO, 1).items()}
    records = [
        as_stored({name: rng.random(shape, np.float32) for name, shape in shapes.items()}) for _ in range(4)
    ]
    settings = {"video": VIDEO, "vae": vae_hash}
    splits = {"train": records, "test": records[:1]}
    return write_dataset("encoded_clips", directory, lambda: features(records[0]), splits, settings)


@pytest.mark.slow
def test_a_new_adapter_is_trained_stored_sampled_and_exported(tmp_path):
    weights = write_store(tmp_path / "weights", model())
    records = write_records(tmp_path / "records", model(), record_hashes(weights)["vae"])
    stage = StageConfig(
        num_steps=3, batch_size=2, parameters=(("^adapters/mood/", "trained"), ("", "frozen"))
    )
    config = StagesConfig(
        loop=LoopConfig(num_workers=0, sample_every=0, validate_every=3, save_every=3), stages=(stage,)
    )
    store = finetune(
        weights,
        [records],
        tmp_path / "run",
        pipeline="FantasyTalkingPipeline",
        model=model(),
        video=VIDEO,
        sampling=SampleConfig(num_inference_steps=2),
        config=replace(config, mesh=replace(config.mesh, fsdp=1)),
    )
    assert not (store / "mood_adapter").is_symlink()
    assert (store / "transformer").is_symlink()

    networks = stored_networks(store, model())
    transformer = networks["transformer"]
    assert dropout_groups(transformer) == ("audio", "image", "mood", "text")
    value = transformer.adapters["mood"].layers.value.kernel[...]
    assert np.abs(value.astype(np.float32)).max() > 0

    spec = ClipInputs.spec(model(), VIDEO, 1)
    inputs = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), spec)
    noise = normal(*VIDEO.latent_shape(1, 16), seed=0)
    sampler = SamplerConfig(num_inference_steps=2)

    def latents(mood, guidance):
        adapters = inputs.adapters | {"mood": jnp.full_like(inputs.adapters["mood"], mood)}
        return np.asarray(
            sample(transformer, noise, replace(inputs, adapters=adapters), sampler, guidance=guidance)
        )

    guided = guidance_branches(2, 1.0, 3.0, "mood")
    assert np.array_equal(latents(1.0, guided), latents(1.0, guided))
    assert latents(1.0, guided).shape == noise.shape

    file = tmp_path / "mood.safetensors"
    export_weights(store, "mood_adapter", file, progress=False)
    tensors = load_file(file)
    assert set(tensors) == {
        "projection.weight",
        *(f"blocks.{i}.{x}.weight" for i in range(2) for x in ("key", "value")),
    }
    np.testing.assert_array_equal(tensors["blocks.1.value.weight"], np.asarray(value[1]).T)


@pytest.mark.slow
def test_a_new_adapter_is_compiled_with_the_programs():
    stages = StagesConfig(stages=(StageConfig(batch_size=2),))
    mesh = make_mesh(fsdp=2, context=2)
    with jax.set_mesh(mesh):
        (step,) = training_programs(model(), stages, VIDEO, mesh)
        step.lower().compile()
    mesh = make_mesh(context=2, tensor=2)
    with jax.set_mesh(mesh):
        programs = list(sampling_programs(model(), SampleConfig(num_inference_steps=2), VIDEO, mesh))
        (step,) = (program for program in programs if "step" in program.name)
        step.lower().compile()
        assert "mood" in str(jax.tree_util.tree_structure(step.arguments))
