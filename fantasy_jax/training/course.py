"""The course of a training from nothing: clips, encoders of speech and faces, VAE, transformer, weights.

Each part is done once: what is complete is taken as it is, what was interrupted goes on. In the workdir:

    data/          the clips                        speech/ face/ vae/   checkpoints and logs
    encoded/       what the VAE and encoders made   clip_stage/          checkpoints, logs, weights
    weights/       the store that is sampled from   frame_stage/         checkpoints and logs
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax import cli
from fantasy_jax.config import ConfigError
from fantasy_jax.data.encoded import encode_dataset
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import open_split
from fantasy_jax.data.speech import SpeechEncoder, Wav2Vec2Features
from fantasy_jax.data.synthetic import SyntheticConfig, prepare
from fantasy_jax.data.text import byte_tokenizer
from fantasy_jax.models.face_encoder import FaceEncoder
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.pipeline import ModelConfig, RandomNetworks, SampleConfig, from_uint8, to_uint8
from fantasy_jax.sharding import make_mesh, rows_of_this_process
from fantasy_jax.training.face import FaceStageConfig, TwoFrames, face_loss, start_from_faces
from fantasy_jax.training.loop import Task, train
from fantasy_jax.training.speech import LipReader, SpeechStageConfig, hear, speech_loss
from fantasy_jax.training.stages import SHOWN, STAGES, StagesConfig, pairs, train_stages
from fantasy_jax.training.state import cast_parameters
from fantasy_jax.training.vae import (
    Crop,
    VAEStageConfig,
    normalise_latents,
    start_from_principal_components,
    vae_loss,
)
from fantasy_jax.typing import UInt8
from fantasy_jax.weights import ADAPTERS, FOLDERS, save_network

_STARTED_FROM, _NORMALISED_OVER = 128, 512


@dataclass(frozen=True)
class TrainConfig(StagesConfig):
    """A course: how each part is trained, and what happens beside the steps.

    Attributes:
        speech: The speech encoder's training.
        face: The face encoder's training.
        vae: The VAE's training.
    """

    speech: SpeechStageConfig = SpeechStageConfig()
    face: FaceStageConfig = FaceStageConfig()
    vae: VAEStageConfig = VAEStageConfig()


class Course:
    """Trains a small system from nothing, on synthetic clips.

    Text and picture encoders stay as they are drawn: tokens of random networks tell prompts and pictures
    apart, and a small transformer learns to read them.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        data: SyntheticConfig,
        model: ModelConfig,
        sampling: SampleConfig,
        config: TrainConfig,
    ):
        """Keeps the settings; nothing is done before `run`.

        Raises:
            ConfigError: The VAE's crops are larger than clips, or do not divide into latents; or there are no
                devices for the mesh, or they cannot share a batch.
        """
        crop, factor = config.vae.crop, model.vae.spatial_factor
        if crop > data.size or crop % factor or config.vae.frames > data.num_frames:
            raise ConfigError(
                f"train.vae: crops of {config.vae.frames} frames of {crop} do not fit; "
                f"at most {data.num_frames} of {data.size}, and a multiple of {factor}"
            )
        self.workdir, self.data, self.model, self.sampling, self.config = (
            workdir,
            data,
            model,
            sampling,
            config,
        )
        # Before any work: whether there are such devices, and whether they can share the batches.
        self.mesh = make_mesh(**config.mesh.axes)
        for stage in (config.speech, config.face, config.vae, config.clip_stage, config.frame_stage):
            rows_of_this_process(stage.batch_size // stage.optimizer.accumulate, self.mesh)
        self.networks = _Encoders(model, byte_tokenizer(), seed=config.loop.seed)

    def run(self) -> Path:
        """Runs what is not done yet; returns the store of weights."""
        with cli.phase("Clips"):
            clips = prepare(self.data, self.workdir / "data")
        with cli.phase("Speech encoder"):
            self.networks.trained_speech_encoder = self._train_speech_encoder(clips)
        if self.model.face_encoder:
            with cli.phase("Face encoder"):
                self.networks.trained_face_encoder = self._train_face_encoder(clips)
        with cli.phase("VAE"):
            self.networks.trained_vae = self._train_vae(clips)
        settings = {
            "data": self.data,
            "speech": self.config.speech,
            "face": self.config.face,
            "vae": self.config.vae,
            "model": self.model,
        }
        with cli.phase("Encoded clips"):
            encoded = encode_dataset(self.networks, clips, self.workdir / "encoded", settings)
        stages = train_stages(
            self.networks,
            encoded,
            self.workdir,
            mesh=self.mesh,
            sampling=self.sampling,
            config=self.config,
            settings=settings,
        )
        for name, transformer in stages:
            last = name == STAGES[-1]
            self._save(self.workdir / ("weights" if last else f"{name}/weights"), transformer)
        return self.workdir / "weights"

    def _train_speech_encoder(self, clips: Path) -> Wav2Vec2Model:
        config, loop = self.config.speech, self.config.loop
        encoder = self.networks.random_speech_encoder()
        task = Task(
            "speech",
            LipReader(encoder, rngs=nnx.Rngs(loop.seed)),
            speech_loss,
            partial(batches, open_split(clips, "train"), hear),
            config.batch_size,
            config.steps,
            config.optimizer,
            settings={"data": self.data, "speech": config, "model": encoder.config, "seed": loop.seed},
        )
        return train(task, loop, self.workdir / "speech", self.mesh).encoder

    def _train_face_encoder(self, clips: Path) -> FaceEncoder:
        config, loop, records = self.config.face, self.config.loop, open_split(clips, "train")
        encoder = self.networks.random_face_encoder()
        cut = TwoFrames(encoder.config.image_size, config.jitter, config.light)
        rng = np.random.default_rng(loop.seed)
        some = [cut(records[i], rng)["faces"] for i in range(min(_STARTED_FROM, len(records)))]
        start_from_faces(encoder, np.concatenate(some))
        task = Task(
            "face",
            encoder,
            partial(face_loss, temperature=config.temperature),
            partial(batches, records, cut),
            config.batch_size,
            config.steps,
            config.optimizer,
            settings={"data": self.data, "face": config, "model": encoder.config, "seed": loop.seed},
        )
        return train(task, loop, self.workdir / "face", self.mesh)

    def _train_vae(self, clips: Path) -> WanVAE:
        config, loop, records = self.config.vae, self.config.loop, open_split(clips, "train")
        shown = _videos(open_split(clips, "test"), range(SHOWN))

        def show(model: WanVAE, videos: Path | None) -> dict[str, np.ndarray]:
            decoded = nnx.jit(lambda vae, video: vae.decode(vae.encode(video)))(model, from_uint8(shown))
            return {"reconstructed": pairs(shown, to_uint8(np.asarray(decoded)))}

        model = self.networks.random_vae()
        some = [records[i] for i in range(min(_STARTED_FROM, len(records)))]
        video, lips = (np.stack([record[name] for record in some]) for name in ("video", "lips"))
        start_from_principal_components(model, video, lips, lips_weight=config.lips_weight)
        task = Task(
            "vae",
            model,
            partial(vae_loss, config=config),
            partial(batches, records, Crop(config.crop, config.frames, config.mouth_share)),
            config.batch_size,
            config.steps,
            config.optimizer,
            show=show,
            settings={"data": self.data, "vae": config, "seed": loop.seed},
        )
        model = train(task, loop, self.workdir / "vae", self.mesh)
        some = range(0, min(_NORMALISED_OVER, len(records)), SHOWN)
        normalise_latents(model, [_videos(records, range(i, i + SHOWN)) for i in some])
        return model

    def _save(self, folder: Path, transformer: WanTransformer) -> None:
        """Writes a store that `sample.py` takes, in bfloat16: half the size, and samples look the same."""
        networks = {
            "wan2.1_i2v_dit": transformer,
            **{ADAPTERS[name]: adapter for name, adapter in transformer.adapters.items()},
            "wan_vae": self.networks.vae(),
            "umt5_encoder": self.networks.text_encoder()[0],
            "clip_vision": self.networks.image_encoder(),
            "wav2vec2": self.networks.speech_encoder().model,
        }
        if self.model.face_encoder:
            networks["arcface"] = self.networks.face_encoder()
        for component, network in networks.items():
            save_network(
                folder / FOLDERS[component], cast_parameters(network, jnp.bfloat16), component=component
            )


class _Encoders(RandomNetworks):
    """Random networks, but for those that are trained."""

    trained_speech_encoder: Wav2Vec2Model | None = None
    trained_face_encoder: FaceEncoder | None = None
    trained_vae: WanVAE | None = None

    def random_speech_encoder(self) -> Wav2Vec2Model:
        """One to start from."""
        return super().speech_encoder().model

    def speech_encoder(self) -> SpeechEncoder:
        """The trained one."""
        return Wav2Vec2Features(self.trained_speech_encoder)

    def random_face_encoder(self) -> FaceEncoder:
        """One to start from."""
        return super().face_encoder()

    def face_encoder(self) -> FaceEncoder:
        """The trained one."""
        return self.trained_face_encoder

    def random_vae(self) -> WanVAE:
        """One to start from."""
        return super().vae()

    def vae(self) -> WanVAE:
        """The trained one."""
        return self.trained_vae


def _videos(records, numbers: range) -> UInt8[np.ndarray, "B T H W 3"]:
    return np.stack([records[i]["video"] for i in numbers if i < len(records)])
