"""The stages of the transformer's training, on encoded clips, one after another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fantasy_jax import cli
from fantasy_jax.config import PositiveFloat, Settings
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import ReadableRecords, open_split
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.errors import ConfigError
from fantasy_jax.media import write_audio, write_video
from fantasy_jax.models.lora import LoRAConfig, add_lora
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.preprocessing.images import to_uint8
from fantasy_jax.sharding import MeshConfig, in_host_memory, make_global_batch, process_rows
from fantasy_jax.system.encoders import encode_text
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.networks import Networks
from fantasy_jax.training.checkpoint import check_resumable
from fantasy_jax.training.loop import LoopConfig, TrainingTask, checkpoint_folder, train
from fantasy_jax.training.objective import (
    VALIDATION_SIGMAS,
    PadText,
    StageConfig,
    check_inputs,
    validation_losses,
    velocity_objective,
)
from fantasy_jax.training.parameters import lora_layers, parameter_modes
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, Int16, UInt8
from fantasy_jax.video import SAMPLE_RATE

NUM_SAMPLES = 4
"""Held-out clips that are sampled during training."""


@dataclass(frozen=True)
class StagesConfig(Settings):
    """Training of the transformer.

    Attributes:
        loop: Logs, checkpoints, loader.
        mesh: Sizes of the mesh.
        stages: The stages, each starting where the one before ended.
        shares: Share of the batches that each dataset has, up to a common factor; none: its share of clips.
        lora: Sizes of the LoRA, where a stage's rules ask for one.
    """

    loop: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()
    stages: tuple[StageConfig, ...] = (
        StageConfig(),
        StageConfig(audio_attention="frame", lip_mask_probability=0.8),
    )
    shares: tuple[PositiveFloat, ...] = ()
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self):
        super().__post_init__()
        if not self.stages:
            raise ConfigError("stages is empty; at least one stage is needed")


def stage_name(index: int) -> str:
    """Name of a stage in logs, and of its folder in the workdir: `stage_1` for the first."""
    return f"stage_{index + 1}"


def prepare_for_stage(
    transformer: WanTransformer, stage: StageConfig, config: StagesConfig
) -> WanTransformer:
    """Sets up the transformer as a stage trains it, in place, with the LoRA that the stage's rules ask for.

    Args:
        transformer: The transformer; inside `nnx.eval_shape`, an abstract one.
        stage: The stage.
        config: All settings.

    Raises:
        ConfigError: The stage's rules do not fit.
    """
    transformer.remat_save_names = stage.remat_save_names
    transformer.context_parallelism = config.mesh.context_parallelism
    layers = lora_layers(transformer, stage.parameters)
    add_lora(transformer, layers, config.lora, rngs=nnx.Rngs(config.loop.seed))
    return transformer


def without(config: Any, *names: str) -> dict[str, Any]:
    """The settings of a dataclass but for some of them."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in names}


def check_shares(config: StagesConfig, datasets: int) -> None:
    """Raises a ConfigError unless there is a share for each of so many datasets, or none."""
    if len(config.shares) not in (0, datasets):
        raise ConfigError(
            f"train.shares has {len(config.shares)} numbers for {datasets} datasets; give one for each, or "
            "none"
        )


def stage_settings(config: StagesConfig, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the settings that decide the result of each stage, by their config names.

    Logs, checkpoints, validation, workers and memory do not. The number of steps of the stage itself is left
    out, since a stage can be given more of them; those of the stages before it are not.

    Args:
        config: All settings.
        settings: Settings that decide the initial weights and the records.
    """
    common = {**settings.get("train", {}), "lora": config.lora, "loop": {"seed": config.loop.seed}}
    common["shares"] = config.shares
    found, before = [], {}
    for index, stage in enumerate(config.stages):
        own = {str(index): without(stage, "num_steps", "remat_save_names")}
        found.append({**settings, "train": common | {"stages": before | own}})
        before = before | {str(index): without(stage, "remat_save_names")}
    return found


def train_stages(
    networks: Networks,
    records: Sequence[Path],
    workdir: Path,
    *,
    mesh: Mesh,
    fps: int,
    sampling: PipelineConfig,
    config: StagesConfig,
    settings: dict[str, Any],
) -> Iterator[tuple[int, WanTransformer]]:
    """Trains all stages, or resumes where an earlier call stopped.

    Args:
        networks: The initial transformer, and the encoders and the VAE for samples.
        records: Folders of the encoded clips (`data.encoded`); the clips of each have one size and number of
            people.
        workdir: Gets a folder for each stage.
        mesh: Mesh of all devices.
        fps: Frames per second of the clips.
        sampling: How samples are made.
        config: All settings.
        settings: Further settings that decide the result, by their config names.

    Yields:
        Each stage's index and the transformer that it trained.

    Raises:
        ConfigError: Rules do not fit the parameters, records do not fit the adapters or the stage's loss,
            there is another number of shares than of datasets, or a stage was begun with other settings.
    """
    check_shares(config, len(records))
    deciding = stage_settings(config, settings)
    for index in range(len(config.stages)):  # before another stage is trained for nothing
        check_resumable(checkpoint_folder(workdir / stage_name(index)), deciding[index])
    empty_text = encode_text(networks, [""])[0]
    with in_host_memory():  # no device has to hold all of what the mesh shares
        transformer = networks["transformer"]
    for stage in config.stages:  # an error in the last stage's settings must not show up after days
        parameter_modes(transformer, stage.parameters)
        for folder in records:
            first = ReadableRecords(open_split(folder, "train"))[0][1]
            check_inputs(transformer, first, stage, name=folder)
    for index, stage in enumerate(config.stages):
        name = stage_name(index)
        with cli.timed(f"Stage {index + 1}"):
            with in_host_memory():
                transformer = prepare_for_stage(transformer, stage, config)
            data = _StageData(networks, records, empty_text, mesh, fps)
            task = data.task(name, transformer, stage, sampling, config, deciding[index])
            transformer = train(task, config.loop, workdir / name, mesh)
        yield index, transformer


@dataclass(frozen=True)
class _StageData:
    """What the stages have in common."""

    networks: Networks
    records: Sequence[Path]
    empty_text: Float[Array, "1 L C"]
    mesh: Mesh
    fps: int

    def task(
        self,
        name: str,
        transformer: WanTransformer,
        stage: StageConfig,
        sampling: PipelineConfig,
        config: StagesConfig,
        settings: dict[str, Any],
    ) -> TrainingTask:
        pad = PadText(self.networks.config.transformer.text_length)
        sources = [open_split(folder, "train") for folder in self.records]
        return TrainingTask(
            name,
            transformer,
            partial(velocity_objective, config=stage, empty_text=self.empty_text),
            partial(batches, sources, pad, shares=config.shares),
            stage.batch_size,
            stage.num_steps,
            stage.optimizer,
            parameters=stage.parameters,
            sample=self._sampler(sampling, stage) if config.loop.sample_every else None,
            validate=self._validator(pad, stage) if config.loop.validate_every else None,
            settings=settings,
        )

    @property
    def _prefixes(self) -> list[str]:
        """What the names of each dataset's losses and samples begin with: of several, its number from 1."""
        return [f"{i}/" for i in range(1, len(self.records) + 1)] if len(self.records) > 1 else [""]

    def _held_out_batch(self, folder: Path, pad: PadText, batch_size: int) -> Batch:
        tests = ReadableRecords(open_split(folder, "test"))
        rows = process_rows(batch_size, self.mesh)
        examples = [pad(tests[int(row) % len(tests)][1]) for row in rows]
        local = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        return make_global_batch(local, rows, batch_size, self.mesh)

    def _validator(self, pad: PadText, stage: StageConfig) -> Callable[[WanTransformer], dict[str, float]]:
        """Returns a function that computes the losses of held-out clips at each noise level.

        They are those of a batch of each dataset.
        """
        held_out = [self._held_out_batch(folder, pad, stage.batch_size) for folder in self.records]

        @partial(jax.jit, static_argnums=0)
        def losses(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, sigma: Array) -> Metrics:
            model = nnx.merge(graphdef, state)
            return validation_losses(model, batch, sigma, config=stage, empty_text=self.empty_text)

        def validate(model: WanTransformer) -> dict[str, float]:
            graphdef, state = nnx.split(model)

            def of_batch(batch: Batch) -> dict[str, float]:
                found = [jax.device_get(losses(graphdef, state, batch, sigma)) for sigma in VALIDATION_SIGMAS]
                means = {name: float(np.mean([level[name] for level in found])) for name in found[0]}
                levels = zip(VALIDATION_SIGMAS, found, strict=True)
                return means | {f"at_{sigma}/{name}": float(x[name]) for sigma, x in levels for name in x}

            each = zip(self._prefixes, map(of_batch, held_out), strict=True)
            return {prefix + name: value for prefix, values in each for name, value in values.items()}

        return validate

    def _sampler(
        self, sampling: PipelineConfig, stage: StageConfig
    ) -> Callable[[WanTransformer, Path | None], dict[str, np.ndarray]]:
        """Returns a function that samples held-out clips of each dataset.

        It makes images and, if a folder is given, videos.
        """
        samplers = [self._sampler_of(folder, sampling, stage) for folder in self.records]

        def show(model: WanTransformer, videos: Path | None) -> dict[str, np.ndarray]:
            return {
                f"{prefix}sampled": sampled(model, videos and videos / prefix)
                for prefix, sampled in zip(self._prefixes, samplers, strict=True)
            }

        return show

    def _sampler_of(
        self, folder: Path, sampling: PipelineConfig, stage: StageConfig
    ) -> Callable[[WanTransformer, Path | None], UInt8[np.ndarray, "R C 3"]]:
        """As `_sampler`, of one dataset: one image."""
        tests = ReadableRecords(open_split(folder, "test"))
        shown = [tests[i][1] for i in range(min(NUM_SAMPLES, len(tests)))]
        inputs = ClipInputs.from_records(shown, self.empty_text)
        truth = jnp.asarray(np.stack([record["latents"] for record in shown]), jnp.float32)
        decode = nnx.jit(lambda vae, latents: vae.decode(latents))
        options = sampling.adapter_options | {
            name: {**sampling.adapter_options.get(name, {}), **own}
            for name, own in stage.adapter_options.items()
        }

        def show(model: WanTransformer, videos: Path | None) -> np.ndarray:
            noise = jax.random.normal(jax.random.key(0), truth.shape)
            latents = sample(model, noise, inputs, sampling, guidance=sampling.guidance, options=options)
            vae = self.networks["vae"]
            true, sampled = (to_uint8(np.asarray(decode(vae, x))) for x in (truth, latents))
            for i in range(len(sampled) if videos else 0):
                _write_clip(videos / f"{i}.mp4", sampled[i], self.fps, shown[i].get("waveform"))
            return pairs(true, sampled)

        return show


def _write_clip(
    path: Path, video: UInt8[np.ndarray, "T H W 3"], fps: int, waveform: Int16[np.ndarray, " samples"] | None
) -> None:
    """Writes a video and, if its audio is known, the audio in it and beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if waveform is not None:
        write_audio(path.with_suffix(".wav"), waveform, SAMPLE_RATE)
    write_video(path, video, fps, audio=None if waveform is None else path.with_suffix(".wav"))


def pairs(
    true: UInt8[np.ndarray, "B T H W 3"], generated: UInt8[np.ndarray, "B T H W 3"]
) -> UInt8[np.ndarray, "R C 3"]:
    """One image: every other frame side by side, each generated clip below its ground truth."""
    rows = [
        np.concatenate(list(video[::2]), axis=1)
        for pair in zip(true, generated, strict=True)
        for video in pair
    ]
    return np.concatenate(rows, axis=0)
