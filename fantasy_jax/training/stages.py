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
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import open_split
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.models.vae import CHUNK
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import PIXELS_PER_LATENT, ModelConfig, Networks, SampleConfig, encode_text, to_uint8
from fantasy_jax.sharding import MeshConfig, batch_sharding, in_host_memory
from fantasy_jax.training.loop import LoopConfig, Task, train
from fantasy_jax.training.state import Batch
from fantasy_jax.training.talking import PadText, TalkingStageConfig, sampling_inputs, talking_loss
from fantasy_jax.typing import Array, Float, UInt8

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
    """

    loop: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()
    clip_stage: TalkingStageConfig = TalkingStageConfig()
    frame_stage: TalkingStageConfig = TalkingStageConfig(audio="frame", lip_probability=0.8)


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
    for name in STAGES:
        settings = settings | {name: getattr(config, name)}
        with cli.phase(name.replace("_", " ").capitalize()):
            task = _task(name, transformer, empty_text, networks, records, sampling, config, settings)
            transformer = train(task, config.loop, workdir / name, mesh)
        yield name, transformer


def _task(
    name: str,
    transformer: WanTransformer,
    empty_text: Float[Array, "1 L C"],
    networks: Networks,
    records: Path,
    sampling: SampleConfig,
    config: StagesConfig,
    settings: dict[str, Any],
) -> Task:
    stage = getattr(config, name)
    transformer.saved_names = stage.saved
    text_length = networks.config.transformer.text_length
    return Task(
        name,
        transformer,
        partial(talking_loss, config=stage, empty_text=empty_text),
        partial(batches, open_split(records, "train"), PadText(text_length)),
        stage.batch_size,
        stage.steps,
        stage.optimizer,
        trainable=stage.trainable,
        show=_shower(networks, records, empty_text, replace(sampling, audio=stage.audio))
        if config.loop.show_every
        else None,
        settings=settings,
    )


def _shower(
    networks: Networks, records: Path, empty_text: Float[Array, "1 L C"], sampling: SampleConfig
) -> Callable[[WanTransformer], dict[str, np.ndarray]]:
    """What makes pictures of held-out clips, as the stage hears while it is trained."""
    tests = open_split(records, "test")
    shown = [tests[i] for i in range(min(SHOWN, len(tests)))]
    inputs = sampling_inputs(shown, empty_text)
    truth = jnp.asarray(np.stack([record["latents"] for record in shown]))
    decode = nnx.jit(lambda vae, latents: vae.decode(latents))

    def show(model: WanTransformer) -> dict[str, np.ndarray]:
        noise = jax.random.normal(jax.random.key(0), truth.shape)
        latents = sample(model, noise, inputs, sampling)
        true, made = (to_uint8(np.asarray(decode(networks.vae(), x))) for x in (truth, latents))
        return {"sampled": pairs(true, made)}

    return show


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
        # One feature for each 20 ms that fit (wav2vec2's convolutions: 400 samples, then every 320).
        "audio": ((samples - 400) // 320 + 1, model.audio_adapter.feature_width),
    }
    if model.motion_adapter:
        shapes["motion"] = (2,)
    if model.identity_adapter:
        shapes["face"] = (model.identity_adapter.feature_size**2, model.identity_adapter.feature_width)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32, sharding=batch_sharding(mesh))
        for name, shape in shapes.items()
    }
