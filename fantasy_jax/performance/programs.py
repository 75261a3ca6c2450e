"""The programs of a configuration: the very callables that run, and arguments that have no values."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.data.text import byte_tokenizer
from fantasy_jax.diffusion.guidance import branches
from fantasy_jax.diffusion.sampler import SamplerInputs, branch_conditions, euler_step
from fantasy_jax.models.layers import run
from fantasy_jax.models.rows import sharing_rows
from fantasy_jax.models.tiling import decode
from fantasy_jax.performance.ahead import Program
from fantasy_jax.performance.flops import count_flops
from fantasy_jax.pipeline import ModelConfig, RandomNetworks, SampleConfig, encode_first_frame
from fantasy_jax.sharding import share
from fantasy_jax.training.stages import STAGES, StagesConfig, abstract_batch, ready_for_stage
from fantasy_jax.training.state import Trainer
from fantasy_jax.training.talking import talking_loss
from fantasy_jax.typing import Array, DType


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


def sampling_programs(
    model: ModelConfig, config: SampleConfig, size: tuple[int, int], mesh: Mesh
) -> Iterator[Program]:
    """All that makes the longest clip, in the order in which it runs.

    Args:
        model: All sizes.
        config: Of the sampler.
        size: Height and width, in pixels.
        mesh: That is in force.
    """
    networks = RandomNetworks(model, byte_tokenizer())
    tokens = _whole((2, model.transformer.text_length), mesh, np.int32)  # the prompt's and the negative one's
    lengths = _whole((2,), mesh, np.int32)
    portrait = _whole((1, model.image_encoder.image_size, model.image_encoder.image_size, 3), mesh)
    yield _of_network("text encoder", lambda: networks.text_encoder()[0], mesh, run, (tokens, lengths))
    yield _of_network("picture encoder", networks.image_encoder, mesh, run, (portrait,))
    if model.face_encoder:
        face = _whole((1, model.face_encoder.image_size, model.face_encoder.image_size, 3), mesh)
        yield _of_network("face encoder", networks.face_encoder, mesh, run, (face,))
    sound = _whole((1, int(config.max_frames / config.fps * SAMPLE_RATE)), mesh)
    yield _of_network("speech encoder", lambda: networks.speech_encoder().model, mesh, run, (sound,))
    yield vae_encode(model, config, size, mesh)
    yield from guided_step(model, config, size, mesh)
    yield vae_decode(model, config, size, mesh)


def vae_encode(model: ModelConfig, config: SampleConfig, size: tuple[int, int], mesh: Mesh) -> Program:
    """The first frame of the longest clip; arguments as of `sampling_programs`."""
    make, picture = RandomNetworks(model, byte_tokenizer()).vae, _whole((1, *size, 3), mesh)
    return _of_network(
        "first frame to latents", make, mesh, encode_first_frame, (picture,), (config.max_frames,)
    )


def vae_decode(model: ModelConfig, config: SampleConfig, size: tuple[int, int], mesh: Mesh) -> Program:
    """The longest clip, or a tile of it where one device decodes; arguments as of `sampling_programs`."""
    make = RandomNetworks(model, byte_tokenizer()).vae
    latents = abstract_batch(model, config, size, 1, mesh)["latents"].shape
    if sharing_rows() > 1:
        return _of_network("latents to video", make, mesh, decode, (_whole(latents, mesh),))
    sides = map(min, latents[2:4], config.tile)
    tile = _whole((*latents[:2], *sides, latents[-1]), mesh)
    return _of_network("a tile of latents to video", make, mesh, decode, (tile,))


def _of_network(
    name: str, make: Callable, mesh: Mesh, function: Callable, inputs: tuple, static: tuple = ()
) -> Program:
    """A jitted function of a network, arrays, and what is no array."""
    network = share(nnx.eval_shape(make), mesh)
    graphdef, state = nnx.split(network)

    def plain(state: nnx.State, *inputs: Array) -> Array:
        return function.__wrapped__(nnx.merge(graphdef, state), *inputs, *static)

    def call(state: nnx.State, *inputs: Array) -> Array:
        return function(nnx.merge(graphdef, state), *inputs, *static)

    arguments = (state, *inputs)
    lower = partial(function.lower, network, *inputs, *static)
    return Program(name, lower, arguments, count_flops(plain, *arguments), call)


def _whole(shape: tuple[int, ...], mesh: Mesh, dtype: DType = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


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
    pair, motion, scale = (_whole(shape, mesh) for shape in ((2,), (1, 2), ()))
    moves = (motion, scale) if model.motion_adapter else ()
    arguments = (state, latents, first_frame, conditions, pair, pair, *moves)
    static = (graphdef, config.batch_branches)
    yield Program(
        f"guided step, {len(needed)} branches",
        partial(euler_step.lower, *static, *arguments),
        arguments,
        count_flops(partial(euler_step.__wrapped__, *static), *arguments),
        partial(euler_step, *static),
    )
