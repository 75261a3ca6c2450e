"""The programs of a config: the jitted functions that training and sampling run, with abstract arguments."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fantasy_jax.data.encoded import batch_spec
from fantasy_jax.diffusion.sampler import StepData, StepProgram, branch_conditions, guided_step, hashable
from fantasy_jax.diffusion.windows import WindowSchedule
from fantasy_jax.models.eight_bit import EightBit
from fantasy_jax.models.halo import num_row_shards
from fantasy_jax.models.layers import run
from fantasy_jax.performance.flops import count_flops
from fantasy_jax.performance.program import Program
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.sharding import RULES, batch_sharding
from fantasy_jax.system.encoders import encode_first_frame
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks, abstract_networks
from fantasy_jax.system.registry import component_of
from fantasy_jax.system.streaming import decode_step
from fantasy_jax.training.objective import velocity_objective
from fantasy_jax.training.stages import StagesConfig, prepare_for_stage
from fantasy_jax.training.state import Trainer
from fantasy_jax.typing import DType, Leaf
from fantasy_jax.video import VideoConfig


def training_programs(
    model: ModelConfig, config: StagesConfig, video: VideoConfig, mesh: Mesh
) -> Iterator[Program]:
    """Yields the train step of each stage: loss, gradients, optimizer, moving average.

    Args:
        model: All sizes.
        config: Settings of the stages.
        video: Size and length of the clips.
        mesh: The current mesh.
    """
    networks = abstract_networks(model, mesh, config.mesh)
    empty_text = np.zeros((1, 1, model.text_encoder.dim), np.float32)
    step = _replicated((), mesh, np.int32)
    for index, stage in enumerate(config.stages):
        trainer = Trainer(
            nnx.eval_shape(partial(prepare_for_stage, stage=stage, config=config), networks["transformer"]),
            partial(velocity_objective, config=stage, empty_text=empty_text),
            stage.optimizer,
            stage.num_steps,
            seed=config.loop.seed,
            mesh=mesh,
            rules=stage.parameters,
        )
        batch = batch_spec(model, video, stage.batch_size, sharding=batch_sharding(mesh))
        arguments = (trainer.init_state(), trainer.frozen_state, batch, step)
        yield Program(
            f"stage {index + 1} step",
            partial(trainer.step.lower, *arguments),
            arguments,
            count_flops(trainer.step, *arguments),
            trainer.step,
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
    """Yields the programs that sample the longest clip: encoders, guided step, decoder.

    Args:
        model: All sizes.
        config: Settings of sampling.
        video: Size and length of the clip.
        mesh: The current mesh.
        people: People of the clip who have inputs of their own.
        eight_bit: Type of 8-bit weights; None: there are none.
    """
    networks = abstract_networks(
        model,
        mesh,
        config.mesh,
        eight_bit=eight_bit,
        weights_memory=config.weights_memory,
        eight_bit_products=config.eight_bit_products,
    )
    for slot, sizes in model.networks.items():
        if (inputs := component_of(sizes).inputs) is not None:
            arrays = [_replicated(shape, mesh, dtype) for shape, dtype in inputs(model, video)]
            yield _network_program(slot.replace("_", " "), networks[slot], run, *arrays)
    yield vae_encode_program(networks, video, mesh)
    yield guided_step_program(networks, config, video, mesh, people=people)
    yield vae_decode_program(networks, config, video, mesh)


def vae_encode_program(networks: Networks, video: VideoConfig, mesh: Mesh) -> Program:
    """Encoding of the first frame, followed by grey frames.

    Args:
        networks: Abstract networks on the mesh.
        video: Size and length of the clip.
        mesh: The current mesh.
    """
    pixels, num_frames = _replicated((1, *video.size, 3), mesh), (video.num_frames,)
    return _network_program(
        "first frame to latents", networks["vae"], encode_first_frame, pixels, static=num_frames
    )


def vae_decode_program(networks: Networks, config: PipelineConfig, video: VideoConfig, mesh: Mesh) -> Program:
    """Decoding of a latent frame after the first or, where one device decodes it, of a tile of it.

    Args:
        networks: Abstract networks on the mesh.
        config: Settings of sampling.
        video: Size and length of the clip.
        mesh: The current mesh.
    """
    vae, name = networks["vae"], "latent frame to video"
    batch, _, *sides, channels = video.latent_shape(1, networks.config.vae.latent_channels)
    if num_row_shards() == 1:
        sides, name = map(min, sides, config.tile), f"a tile of a {name}"
    latent = _replicated((batch, 1, *sides, channels), mesh)
    carried = jax.eval_shape(lambda vae, latent: decode_step(vae, None, latent)[0], vae, latent)
    spec = NamedSharding(mesh, PartitionSpec(None, None, RULES["rows"]))
    carried = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec), carried)
    return _network_program(name, vae, decode_step, carried, latent)


def guided_step_program(
    networks: Networks, config: PipelineConfig, video: VideoConfig, mesh: Mesh, *, people: int = 1
) -> Program:
    """A step of the sampler with all its guidance branches.

    Args:
        networks: Abstract networks on the mesh.
        config: Settings of sampling; a clip of `max_seconds` consists of windows.
        video: Size and length of a window.
        mesh: The current mesh.
        people: People of the clip who have inputs of their own.
    """
    model, branches = networks.config, config.guidance
    clip = video if config.max_seconds is None else video.for_seconds(config.max_seconds)
    graphdef, state = nnx.split(networks["transformer"])
    inputs = ClipInputs.spec(model, clip, 1, people=people, sharding=_sharding(mesh))
    window = ClipInputs.spec(model, video, 1, sharding=_sharding(mesh))
    inputs = replace(inputs, first_frame=window.first_frame)
    dropped, options = tuple(branch.dropped for branch in branches), hashable(config.adapter_options)
    build = partial(branch_conditions, graphdef, dropped, options, clip.num_frames)
    conditions = jax.eval_shape(build, state, inputs)
    shape = clip.latent_shape(1, model.transformer.latent_channels)
    windows = config.windows(clip, video) or WindowSchedule.single(shape[1])
    group = config.window_group(windows.count)
    noise = np.zeros((1, 1, *shape[2:]), np.float32)
    given = replace(windows.at(multiple=group), noise=noise)
    name = f"guided step, {len(branches)} branches"
    if windows.count > 1:
        name += f", {len(given.start)} windows in groups of {group}"
    data = StepData(np.zeros(2, np.float32), np.zeros(len(branches) - 1, np.float32), given)
    latents, conditions, data = jax.tree.map(
        lambda x: _replicated(x.shape, mesh, x.dtype),
        (jax.ShapeDtypeStruct(shape, np.float32), conditions, data),
    )
    static = (graphdef, StepProgram(config.batch_branches, window_group=group))
    arguments = (state, latents, conditions, data)
    return Program(
        name,
        partial(guided_step.lower, *static, *arguments),
        arguments,
        count_flops(partial(guided_step.__wrapped__, *static), *arguments),
        partial(guided_step, *static),
    )


def _network_program(
    name: str, network: nnx.Module, function: Callable, *inputs: Leaf, static: tuple = ()
) -> Program:
    """A jitted function of a network, trees of arrays, and static arguments."""
    graphdef, state = nnx.split(network)

    def plain(state: nnx.State, *inputs: Leaf) -> Leaf:
        return function.__wrapped__(nnx.merge(graphdef, state), *inputs, *static)

    def call(state: nnx.State, *inputs: Leaf) -> Leaf:
        return function(nnx.merge(graphdef, state), *inputs, *static)

    lower = partial(function.lower, network, *inputs, *static)
    return Program(name, lower, (state, *inputs), count_flops(plain, state, *inputs), call)


def _sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _replicated(shape: tuple[int, ...], mesh: Mesh, dtype: DType = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(mesh))
