"""The programs of a config: the jitted functions that training and sampling run, with abstract arguments."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fantasy_jax.data.encoded import batch_spec
from fantasy_jax.diffusion.caching import StepCache
from fantasy_jax.diffusion.sampler import (
    StepData,
    StepProgram,
    branch_conditions,
    euler,
    guided_step,
    hashable,
)
from fantasy_jax.diffusion.windows import WindowSchedule
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.eight_bit import EightBit
from fantasy_jax.models.layers import run
from fantasy_jax.performance.flops import hardware_flops, model_flops
from fantasy_jax.performance.program import Program
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.sharding import RULES, batch_sharding, check_batch_size, last_partition, partition, place
from fantasy_jax.system.encoders import first_frame_program
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks, abstract_networks
from fantasy_jax.system.registry import component_of
from fantasy_jax.system.streaming import decode_step, plan_decoding
from fantasy_jax.system.vae_memory import encoded_at_once, largest_divisor
from fantasy_jax.training.objective import StageConfig, velocity_objective
from fantasy_jax.training.stages import StagesConfig, prepare_for_stage
from fantasy_jax.training.state import Trainer
from fantasy_jax.typing import DType, Leaf
from fantasy_jax.video import VideoConfig


def training_programs(
    model: ModelConfig, config: StagesConfig, video: VideoConfig, mesh: Mesh, *, people: int = 1
) -> Iterator[Program]:
    """Yields the train step of each stage: loss, gradients, optimizer, moving average.

    Args:
        model: All sizes.
        config: Settings of the stages.
        video: Size and length of the clips.
        mesh: The current mesh.
        people: People of each clip, for a model with expressions.

    Raises:
        ConfigError: A batch cannot be sharded evenly.
    """
    networks = abstract_networks(model, mesh, config.mesh)
    empty_text = np.zeros((1, 1, model.text_encoder.dim), np.float32)
    step = _replicated((), mesh, np.int32)

    def make_trainer(stage: StageConfig) -> Trainer:
        return Trainer(
            nnx.eval_shape(partial(prepare_for_stage, stage=stage, config=config), networks["transformer"]),
            partial(velocity_objective, config=stage, empty_text=empty_text),
            stage.optimizer,
            stage.num_steps,
            seed=config.loop.seed,
            mesh=mesh,
            rules=stage.parameters,
        )

    for index, stage in enumerate(config.stages):
        check_batch_size(stage.batch_size, mesh)
        trainer, without_remat = make_trainer(stage), make_trainer(replace(stage, remat_save_names=None))
        batch = batch_spec(model, video, stage.batch_size, people=people, sharding=batch_sharding(mesh))
        arguments = (trainer.init_state(), trainer.frozen_state, batch, step)
        yield Program(
            f"stage {index + 1} step",
            partial(trainer.step.lower, *arguments),
            arguments,
            model_flops(without_remat.step, *arguments),
            hardware_flops(trainer.step, *arguments),
            trainer.step,
            stage.batch_size // stage.optimizer.grad_accum_steps,
        )


def sampling_programs(
    model: ModelConfig,
    config: PipelineConfig,
    video: VideoConfig,
    mesh: Mesh,
    *,
    people: int = 1,
    eight_bit: EightBit | None = None,
) -> Iterator[Program]:
    """Yields the programs that sample the longest clip: encoders, conditions, guided step, decoder.

    Those of the VAE are the ones that need least memory.

    Args:
        model: All sizes.
        config: Settings of sampling.
        video: Size and length of the clip.
        mesh: The current mesh.
        people: People of the clip who have inputs of their own.
        eight_bit: Type of 8-bit weights; None: there are none.

    Raises:
        ConfigError: LoRAs are to stay beside the weights: their products are not compiled.
    """
    if config.loras and not config.merge_lora:
        raise ConfigError(
            "sample.merge_lora is False: what is compiled does not have the products of LoRAs; set it to True"
        )
    networks = abstract_networks(
        model,
        mesh,
        config.mesh,
        eight_bit=eight_bit,
        weights_memory=config.weights_memory,
        eight_bit_products=config.eight_bit_products,
    ).with_dtypes(vae=config.vae_dtype)
    for slot, sizes in model.networks.items():
        if (inputs := component_of(sizes).inputs) is not None:
            arrays = [_replicated(shape, mesh, dtype) for shape, dtype in inputs(model, video)]
            yield _network_program(slot.replace("_", " "), networks[slot], run, *arrays)
    yield vae_encode_program(networks, video, mesh, free=0)
    yield conditions_program(networks, config, video, mesh, people=people)
    yield from guided_step_programs(networks, config, video, mesh, people=people)
    yield vae_decode_program(networks, config, video, mesh, free=0)


def vae_encode_program(networks: Networks, video: VideoConfig, mesh: Mesh, *, free: int | float) -> Program:
    """Encoding of the first-frame condition.

    Args:
        networks: Abstract networks on the mesh.
        video: Size and length of the clip.
        mesh: The current mesh.
        free: Bytes of a device that it may take, which decide how many latent frames it encodes at once.
    """
    vae, pixels = networks["vae"], _replicated((1, *video.size, 3), mesh)
    return _network_program(
        "first frame to latents",
        vae,
        first_frame_program,
        pixels,
        num_frames=video.num_frames,
        still=networks.config.transformer.still_condition,
        at_once=encoded_at_once(vae, video.latent_size, video.latent_frames, free),
    )


def vae_decode_program(
    networks: Networks, config: PipelineConfig, video: VideoConfig, mesh: Mesh, *, free: int | float
) -> Program:
    """Decoding of a chunk after the first latent frame, or of the first tile of it, which is the largest.

    Args:
        networks: Abstract networks on the mesh.
        config: Settings of sampling.
        video: Size and length of the clip.
        mesh: The current mesh.
        free: Bytes of a device that it may take, which decide what is decoded at once.
    """
    vae = networks["vae"]
    batch, count, *sides, channels = video.latent_shape(1, networks.config.vae.latent_channels)
    plan = plan_decoding(vae, _replicated((batch, 1, *sides, channels), mesh), free, **config.decoding)
    sides = [part.stop for part in plan.tiles[0].read]
    at_once = largest_divisor(count - 1, plan.most)
    first, latents = (_replicated((batch, n, *sides, channels), mesh) for n in (1, at_once))
    carried, _ = decode_step.eval_shape(vae, None, first)
    spec = NamedSharding(mesh, PartitionSpec(None, None, RULES["rows"]))
    carried = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec), carried)
    name = "latent frame to video" if at_once == 1 else f"{at_once} latent frames to video"
    name = f"a tile of a {name}" if plan.in_tiles else name
    return _network_program(name, vae, decode_step, carried, latents)


def conditions_program(
    networks: Networks, config: PipelineConfig, video: VideoConfig, mesh: Mesh, *, people: int = 1
) -> Program:
    """Conditions of all guidance branches with their keys and values, which are computed once a clip.

    The arguments are those of `guided_step_programs`.
    """
    clip, windows = _clip(config, video)
    inputs = ClipInputs.spec(networks.config, clip, 1, people=people)
    inputs = replace(inputs, first_frame=ClipInputs.spec(networks.config, video, 1).first_frame)
    dropped = tuple(branch.dropped for branch in config.guidance)
    graphdef, state = nnx.split(networks["transformer"])
    static = (graphdef, dropped, hashable(config.adapter_options), clip.num_frames, windows.count == 1)
    return _program("conditions", branch_conditions, static, (state, _all_replicated(inputs, mesh)))


def guided_step_program(
    networks: Networks, config: PipelineConfig, video: VideoConfig, mesh: Mesh, *, people: int = 1
) -> Program:
    """A step of the sampler with all its guidance branches; the arguments are those of the next function."""
    return next(guided_step_programs(networks, config, video, mesh, people=people))


def guided_step_programs(
    networks: Networks, config: PipelineConfig, video: VideoConfig, mesh: Mesh, *, people: int = 1
) -> Iterator[Program]:
    """Yields the steps of the sampler: the first one, and those that approximate (`EvaluationPlan.kinds`).

    Args:
        networks: Abstract networks on the mesh.
        config: Settings of sampling; a clip of `max_seconds` consists of windows.
        video: Size and length of a window.
        mesh: The current mesh.
        people: People of the clip who have inputs of their own.
    """
    clip, windows = _clip(config, video)
    shape = clip.latent_shape(1, networks.config.transformer.latent_channels)
    group, branches = config.window_group(windows.count), len(config.guidance)
    given = replace(windows.at(multiple=group), noise=np.zeros((1, 1, *shape[2:]), np.float32))
    suffix = f", {len(given.start)} windows in groups of {group}" if windows.count > 1 else ""
    arrays = StepData(np.zeros(2, np.float32), np.zeros(branches - 1, np.float32), given)
    once = conditions_program(networks, config, video, mesh, people=people)
    conditions = jax.eval_shape(once.call, *once.arguments)
    latents, data, conditions = _all_replicated(
        (jax.ShapeDtypeStruct(shape, np.float32), arrays, conditions), mesh
    )
    spread = jax.tree.map(lambda x: NamedSharding(mesh, last_partition(x, "kept")), conditions.kept)
    conditions = replace(conditions, kept=place(conditions.kept, spread))
    graphdef, state = nnx.split(networks["transformer"])
    plan, residuals = config.evaluation_plan(config.guidance), ()
    static = (graphdef, StepProgram(config.batch_branches, euler, (), group, plan.gates, plan.skips))
    for needed, skipped in plan.kinds:
        last = replace(conditions, each=jax.tree.map(partial(_first, needed, mesh), conditions.each))
        cache = StepCache((latents,) * (branches - needed), residuals[-needed:] if skipped else ())
        name = f"guided step, {needed} branch" + ("es" if needed > 1 else "") + suffix
        name += ", blocks skipped" if skipped else ""
        step = _program(name, guided_step, static, (state, latents, last, replace(data, cache=cache)))
        yield step
        if plan.skips and not residuals:
            sharding = NamedSharding(mesh, partition(None, "batch", "space", None, None))
            found = jax.eval_shape(step.call, *step.arguments)[1].residuals
            residuals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in found)


def _clip(config: PipelineConfig, video: VideoConfig) -> tuple[VideoConfig, WindowSchedule]:
    """The longest clip, and its windows, of which `video` is one."""
    clip = video if config.max_seconds is None else video.for_seconds(config.max_seconds)
    return clip, config.windows(clip, video) or WindowSchedule.single(clip.latent_frames)


def _program(name: str, function: Callable, static: tuple, arguments: tuple) -> Program:
    """A jitted function, whose static arguments come first."""
    plain = partial(function.__wrapped__, *static)
    return Program(
        name,
        partial(function.lower, *static, *arguments),
        arguments,
        model_flops(plain, *arguments),
        hardware_flops(plain, *arguments),
        partial(function, *static),
    )


def _network_program(
    name: str, network: nnx.Module, function: Callable, *inputs: Leaf, **static: Any
) -> Program:
    """A jitted function of a network, trees of arrays, and static arguments."""
    graphdef, state = nnx.split(network)

    def plain(state: nnx.State, *inputs: Leaf) -> Leaf:
        return function.__wrapped__(nnx.merge(graphdef, state), *inputs, **static)

    def call(state: nnx.State, *inputs: Leaf) -> Leaf:
        return function(nnx.merge(graphdef, state), *inputs, **static)

    lower = partial(function.lower, network, *inputs, **static)
    arguments = (state, *inputs)
    counts = model_flops(plain, *arguments), hardware_flops(plain, *arguments)
    return Program(name, lower, arguments, *counts, call)


def _first(count: int, mesh: Mesh, x: Leaf) -> jax.ShapeDtypeStruct:
    return _replicated((count, *x.shape[1:]), mesh, x.dtype)


def _all_replicated(tree: Leaf, mesh: Mesh) -> Leaf:
    return jax.tree.map(lambda x: _replicated(x.shape, mesh, x.dtype), tree)


def _replicated(shape: tuple[int, ...], mesh: Mesh, dtype: DType = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
