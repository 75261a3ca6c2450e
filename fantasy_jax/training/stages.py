"""The transformer's two stages, on encoded clips: the whole clip's sound first, then each frame its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fantasy_jax import cli
from fantasy_jax.data.encoded import STORED
from fantasy_jax.data.loader import batches
from fantasy_jax.data.preprocessing import wav2vec2_length
from fantasy_jax.data.records import open_split
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.media import write_sound, write_video
from fantasy_jax.models.lora import LoRAConfig, add_lora
from fantasy_jax.models.vae import CHUNK
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import PIXELS_PER_LATENT, ModelConfig, Networks, SampleConfig, encode_text, to_uint8
from fantasy_jax.sharding import (
    MeshConfig,
    assemble_batch,
    batch_sharding,
    in_host_memory,
    rows_of_this_process,
)
from fantasy_jax.training.loop import LoopConfig, Task, train
from fantasy_jax.training.parameters import lora_layers, treatments
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.training.talking import (
    VALIDATION_SIGMAS,
    PadText,
    TalkingStageConfig,
    sampling_inputs,
    talking_loss,
    validation_losses,
)
from fantasy_jax.typing import Array, Float, Int16, UInt8

STAGES = ("clip_stage", "frame_stage")
SHOWN = 4


@dataclass(frozen=True)
class StagesConfig:
    """How the transformer is trained, and what happens beside the steps.

    Attributes:
        loop: Logs, checkpoints, loader.
        mesh: How devices share the work.
        clip_stage: The first stage.
        frame_stage: The second, from where the first ended.
        lora: Sizes of a LoRA, where a stage's rules ask for one.
    """

    loop: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()
    clip_stage: TalkingStageConfig = TalkingStageConfig()
    frame_stage: TalkingStageConfig = TalkingStageConfig(audio="frame", lip_probability=0.8)
    lora: LoRAConfig = LoRAConfig()


def ready_for_stage(transformer: WanTransformer, name: str, config: StagesConfig) -> WanTransformer:
    """The transformer as a stage trains it, in place: with the LoRA that its rules ask for.

    Args:
        transformer: Or its `nnx.eval_shape`'s, inside of it.
        name: Of the stage.
        config: All settings.

    Raises:
        ConfigError: The stage's rules do not fit.
    """
    stage = getattr(config, name)
    transformer.saved_names = stage.saved
    transformer.context_parallelism = config.mesh.context_parallelism
    layers = lora_layers(transformer, stage.parameters)
    add_lora(transformer, layers, config.lora, rngs=nnx.Rngs(config.loop.seed))
    return transformer


def train_stages(
    networks: Networks,
    records: Path,
    workdir: Path,
    *,
    mesh: Mesh,
    sampling: SampleConfig,
    config: StagesConfig,
    settings: dict[str, Any],
) -> Iterator[tuple[str, WanTransformer]]:
    """Trains both stages, or from where an earlier call stopped.

    Args:
        networks: The transformer to start from, and what is needed to show samples.
        records: Folder of the encoded clips (`data.encoded`).
        workdir: For a folder of each stage.
        mesh: Of all devices.
        sampling: How samples are shown.
        config: All settings.
        settings: What else decides the result.

    Yields:
        Each stage's name and the transformer that it made.
    """
    empty_text = encode_text(networks, [""])[0]
    with in_host_memory():  # one device of many need not hold what all of them will share
        transformer = networks.transformer()
    for name in STAGES:  # the second's fault would be found after days
        treatments(transformer, getattr(config, name).parameters)
    settings = settings | {"lora": config.lora}
    for name in STAGES:
        settings = settings | {name: getattr(config, name)}
        with cli.phase(name.replace("_", " ").capitalize()):
            with in_host_memory():
                transformer = ready_for_stage(transformer, name, config)
            task = _task(name, transformer, empty_text, networks, records, mesh, sampling, config, settings)
            transformer = train(task, config.loop, workdir / name, mesh)
        yield name, transformer


def _task(
    name: str,
    transformer: WanTransformer,
    empty_text: Float[Array, "1 L C"],
    networks: Networks,
    records: Path,
    mesh: Mesh,
    sampling: SampleConfig,
    config: StagesConfig,
    settings: dict[str, Any],
) -> Task:
    stage, pad = getattr(config, name), PadText(networks.config.transformer.text_length)
    return Task(
        name,
        transformer,
        partial(talking_loss, config=stage, empty_text=empty_text),
        partial(batches, open_split(records, "train"), pad),
        stage.batch_size,
        stage.steps,
        stage.optimizer,
        parameters=stage.parameters,
        show=_shower(networks, records, empty_text, replace(sampling, audio=stage.audio))
        if config.loop.show_every
        else None,
        validate=_validator(records, pad, mesh, stage, empty_text) if config.loop.validate_every else None,
        settings=settings,
    )


def _validator(
    records: Path, pad: PadText, mesh: Mesh, stage: TalkingStageConfig, empty_text: Float[Array, "1 L C"]
) -> Callable[[WanTransformer], dict[str, float]]:
    """What takes the losses of a batch of held-out clips, at each of the noise levels and their mean."""
    tests, rows = open_split(records, "test"), rows_of_this_process(stage.batch_size, mesh)
    examples = [pad(tests[int(row) % len(tests)]) for row in rows]
    local = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    batch = assemble_batch(local, rows, stage.batch_size, mesh)

    @partial(jax.jit, static_argnums=0)
    def losses(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch, sigma: Array) -> Metrics:
        model = nnx.merge(graphdef, state)
        return validation_losses(model, batch, sigma, config=stage, empty_text=empty_text)

    def validate(model: WanTransformer) -> dict[str, float]:
        graphdef, state = nnx.split(model)
        found = [jax.device_get(losses(graphdef, state, batch, sigma)) for sigma in VALIDATION_SIGMAS]
        means = {name: float(np.mean([level[name] for level in found])) for name in found[0]}
        levels = zip(VALIDATION_SIGMAS, found, strict=True)
        return means | {f"at_{sigma}/{name}": float(x[name]) for sigma, x in levels for name in x}

    return validate


def _shower(
    networks: Networks, records: Path, empty_text: Float[Array, "1 L C"], sampling: SampleConfig
) -> Callable[[WanTransformer, Path | None], dict[str, np.ndarray]]:
    """What makes pictures and videos of held-out clips, as the stage hears while it is trained."""
    tests = open_split(records, "test")
    shown = [tests[i] for i in range(min(SHOWN, len(tests)))]
    inputs = sampling_inputs(shown, empty_text)
    truth = jnp.asarray(np.stack([record["latents"] for record in shown]), jnp.float32)
    decode = nnx.jit(lambda vae, latents: vae.decode(latents))

    def show(model: WanTransformer, videos: Path | None) -> dict[str, np.ndarray]:
        noise = jax.random.normal(jax.random.key(0), truth.shape)
        latents = sample(model, noise, inputs, sampling)
        true, made = (to_uint8(np.asarray(decode(networks.vae(), x))) for x in (truth, latents))
        for i in range(len(made) if videos else 0):
            _write_clip(videos / f"{i}.mp4", made[i], sampling.fps, shown[i].get("sound"))
        return {"sampled": pairs(true, made)}

    return show


def _write_clip(
    path: Path, video: UInt8[np.ndarray, "T H W 3"], fps: int, sound: Int16[np.ndarray, " samples"] | None
) -> None:
    """Writes a video, and its sound, if it is known, in it and beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if sound is not None:
        write_sound(path.with_suffix(".wav"), sound, SAMPLE_RATE)
    write_video(path, video, fps, sound=None if sound is None else path.with_suffix(".wav"))


def pairs(
    true: UInt8[np.ndarray, "B T H W 3"], made: UInt8[np.ndarray, "B T H W 3"]
) -> UInt8[np.ndarray, "R C 3"]:
    """One picture: every other frame side by side, each made clip below its true one."""
    rows = [
        np.concatenate(list(video[::2]), axis=1) for pair in zip(true, made, strict=True) for video in pair
    ]
    return np.concatenate(rows, axis=0)


def abstract_batch(
    model: ModelConfig,
    sampling: SampleConfig,
    size: tuple[int, int],
    batch_size: int,
    mesh: Mesh,
) -> Batch:
    """A batch without values, of the longest clips of a size.

    Args:
        model: Widths of what encoders give.
        sampling: Frames, and how many a second.
        size: Height and width in pixels.
        batch_size: Clips.
        mesh: That they are cut for.
    """
    frames = (sampling.max_frames - 1) // CHUNK + 1
    height, width = (side // PIXELS_PER_LATENT for side in size)
    latents = (frames, height, width, model.vae.latent_channels)
    samples = int(sampling.max_frames / sampling.fps * SAMPLE_RATE)
    image = model.image_encoder
    shapes = {
        "latents": latents,
        "first_frame": latents,
        "lips": latents[:3],
        "text": (model.transformer.text_length, model.text_encoder.dim),
        "image": ((image.image_size // image.patch_size) ** 2 + 1, image.dim),
        "audio": (wav2vec2_length(samples), model.audio_adapter.feature_width),
    }
    if model.motion_adapter:
        shapes["motion"] = (2,)
    if model.identity_adapter:
        shapes["face"] = (model.identity_adapter.feature_size**2, model.identity_adapter.feature_width)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), STORED, sharding=batch_sharding(mesh))
        for name, shape in shapes.items()
    }
