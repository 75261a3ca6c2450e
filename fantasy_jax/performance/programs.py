"""The programs of a configuration: the very callables that run, and arguments that have no values."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fantasy_jax.data.text import byte_tokenizer
from fantasy_jax.diffusion.guidance import branches
from fantasy_jax.diffusion.sampler import SamplerInputs, branch_conditions, euler_step
from fantasy_jax.performance.ahead import Program
from fantasy_jax.performance.flops import count_flops
from fantasy_jax.pipeline import ModelConfig, RandomNetworks, SampleConfig
from fantasy_jax.sharding import share
from fantasy_jax.training.stages import STAGES, StagesConfig, abstract_batch, ready_for_stage
from fantasy_jax.training.state import Trainer
from fantasy_jax.training.talking import talking_loss


def training_steps(
    model: ModelConfig, sampling: SampleConfig, config: StagesConfig, size: tuple[int, int], mesh: Mesh
) -> Iterator[Program]:
    """A step of each stage: loss, gradients, optimizer, running mean.

    Args:
        model: All sizes.
        sampling: Length of the clips.
        config: Of the stages.
        size: Height and width of the clips, in pixels.
        mesh: That is in force.
    """
    networks = RandomNetworks(model, byte_tokenizer())
    for name in STAGES:
        stage = getattr(config, name)
        transformer = nnx.eval_shape(lambda name=name: ready_for_stage(networks.transformer(), name, config))
        empty_text = np.zeros((1, 1, model.text_encoder.dim), np.float32)
        trainer = Trainer(
            transformer,
            partial(talking_loss, config=stage, empty_text=empty_text),
            stage.optimizer,
            stage.steps,
            seed=config.loop.seed,
            mesh=mesh,
            rules=stage.parameters,
        )
        number = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        batch = abstract_batch(model, sampling, size, stage.batch_size, mesh)
        arguments = (trainer.initial(), trainer.rest, batch, number)
        yield Program(
            f"{name} step",
            partial(trainer.step.lower, *arguments),
            arguments,
            count_flops(trainer.step, *arguments),
            trainer.step,
        )


def guided_step(
    model: ModelConfig, config: SampleConfig, size: tuple[int, int], mesh: Mesh
) -> Iterator[Program]:
    """A step of the sampler with all its branches, for the longest clip.

    Args:
        model: All sizes.
        config: Of the sampler.
        size: Height and width, in pixels.
        mesh: That is in force.
    """
    transformer = share(nnx.eval_shape(RandomNetworks(model, byte_tokenizer()).transformer), mesh)
    transformer.context_parallelism = config.mesh.context_parallelism
    graphdef, state = nnx.split(transformer)
    whole = NamedSharding(mesh, PartitionSpec())
    batch = {
        name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), np.float32, sharding=whole)
        for name, leaf in abstract_batch(model, config, size, 1, mesh).items()
    }
    latents, text = batch["latents"], batch["text"]
    mask = (*latents.shape[:-1], model.transformer.condition_channels)
    first_frame = jax.ShapeDtypeStruct(mask, latents.dtype, sharding=whole)
    inputs = SamplerInputs(first_frame, text, text, batch["image"], batch["audio"], face=batch.get("face"))
    needed = branches(config.prompt_scale, config.audio_scale, loudness=config.loudness)
    conditions = jax.eval_shape(partial(branch_conditions, graphdef, needed, config.audio), state, inputs)
    pair = jax.ShapeDtypeStruct((2,), np.float32, sharding=whole)
    motion = jax.ShapeDtypeStruct((1, 2), np.float32, sharding=whole) if model.motion_adapter else None
    arguments = (state, latents, first_frame, conditions, pair, pair, motion)
    static = (graphdef, config.batch_branches)
    yield Program(
        f"guided step, {len(needed)} branches",
        partial(euler_step.lower, *static, *arguments),
        arguments,
        count_flops(partial(euler_step.__wrapped__, *static), *arguments),
        partial(euler_step, *static),
    )
