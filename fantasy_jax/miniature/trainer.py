"""Training of the miniature: clips, the encoders that a config has, VAE, transformer.

Each part is done once: complete parts are reused, an interrupted part resumes. Configs whose settings of a
part are equal can share it in one workdir, which holds

    data/          the clips
    speech/ face/ motion/ detector/ vae/    checkpoints and logs of the encoders and of the face detector
    stage_1/ stage_2/     those of the transformer
    encoded/       the encoded clips; encoded_2/ those of two people
    weights/       the weight store; those of earlier stages are in stage_1/weights/

with the last three in a folder of their own where the config names one (`folder`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax import cli
from fantasy_jax.config import Fraction, Range
from fantasy_jax.data.encoded import encode_dataset, encoded_folder
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import check_unchanged, open_split
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.clips import SyntheticConfig, check_video
from fantasy_jax.miniature.stage import EncoderStageConfig, initialise_norms
from fantasy_jax.miniature.synthetic import as_group, clip_settings, write_clips
from fantasy_jax.miniature.train_face_detector import (
    FaceDetectorStageConfig,
    detector_batches,
    detector_loss,
)
from fantasy_jax.miniature.train_face_encoder import FacePairs, FaceStageConfig, face_loss
from fantasy_jax.miniature.train_motion_encoder import (
    MotionRegressor,
    MotionStageConfig,
    erase_person,
    finish_norms,
    motion_batches,
    motion_loss,
)
from fantasy_jax.miniature.train_speech_encoder import (
    MouthRegressor,
    SpeechStageConfig,
    speech_example,
    speech_loss,
)
from fantasy_jax.miniature.train_transformer import initial_networks
from fantasy_jax.miniature.train_vae import (
    VAE_PARAMETERS,
    RandomCrop,
    VAEStageConfig,
    eye_mask,
    initialise_from_pca,
    normalise_latents,
    vae_loss,
)
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipelines.config import PipelineConfig, write_pipeline
from fantasy_jax.preprocessing.images import from_uint8, to_uint8
from fantasy_jax.sharding import make_mesh, process_rows
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.system.registry import component_of
from fantasy_jax.training.checkpoint import check_resumable
from fantasy_jax.training.loop import TrainingTask, checkpoint_folder, train
from fantasy_jax.training.parameters import ALL_TRAINED, ParameterRules
from fantasy_jax.training.stages import (
    NUM_SAMPLES,
    StagesConfig,
    check_shares,
    pairs,
    stage_name,
    train_stages,
    without,
)
from fantasy_jax.training.state import Batch, Loss, cast_parameters
from fantasy_jax.typing import UInt8
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import store_origins
from fantasy_jax.weights.loading import stored_eight_bit, stored_networks
from fantasy_jax.weights.store import LORA, check_writable_store, save_network

ENCODERS = {
    "speech": "speech_encoder",
    "face": "face_encoder",
    "motion": "motion_encoder",
    "detector": "face_detector",
    "vae": "vae",
}
"""Slot of each encoder, and of the face detector, that is trained where the model has it, by its section of
the config, which also names its folder."""
_INITIALISATION_CLIPS, _NORMALISATION_CLIPS = 128, 512
"""Clips for the initial weights of face encoder and VAE, and for the statistics of the VAE's latents."""


@dataclass(frozen=True)
class MiniatureConfig(StagesConfig):
    """Training of the miniature: the stages of the transformer, and before them its encoders.

    Attributes:
        loop: Logs, checkpoints, loader.
        mesh: Sizes of the mesh.
        stages: The stages of the transformer.
        shares: Share of the batches that each dataset has, up to a common factor; none: its share of clips.
        lora: Sizes of the LoRA, where a stage's rules ask for one.
        speech: Training of the speech encoder.
        face: Training of the face encoder.
        motion: Training of the motion encoder.
        detector: Training of the face detector.
        vae: Training of the VAE.
        acting: Strength of acting in the clips of which encoders are trained; `data.acting` is that of the
            transformer's. Encoders that have seen people act serve both.
        people: People in the clips of each dataset of the transformer's training.
        initial: Weight store to start from. Its encoders, VAE and face detector are taken over; of those of
            speech, face and motion, VAE and face detector, missing ones are trained. Its transformer, if it
            has one, is trained further, with new adapters. Empty: all are trained from scratch.
        folder: Folder of the workdir for encoded clips, stages and weights; empty: the workdir itself.
    """

    speech: SpeechStageConfig = SpeechStageConfig()
    face: FaceStageConfig = FaceStageConfig()
    motion: MotionStageConfig = MotionStageConfig()
    detector: FaceDetectorStageConfig = FaceDetectorStageConfig()
    vae: VAEStageConfig = VAEStageConfig()
    acting: Fraction = 1.0
    people: tuple[Annotated[int, Range(1, 2)], ...] = (1,)
    initial: str = ""
    folder: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not self.people:
            raise ConfigError("people is empty; at least one dataset is needed")


TRAININGS: dict[str, type[StagesConfig]] = {
    "talking": StagesConfig,
    "portrait": StagesConfig,
    "miniature": MiniatureConfig,
    "miniature_portrait": MiniatureConfig,
}
"""Settings of the training by the task of the config (`pipelines.tasks`)."""


class MiniatureTrainer:
    """Trains a small system on synthetic clips, from scratch or from a store (`MiniatureConfig.initial`).

    Text and image encoder keep their initial weights, which are random: tokens of random networks distinguish
    prompts and images well enough for a small transformer.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        pipeline: str,
        data: SyntheticConfig,
        video: VideoConfig,
        model: ModelConfig,
        sampling: PipelineConfig,
        config: MiniatureConfig,
    ):
        """Checks the settings; nothing is trained before `run`.

        Args:
            workdir: Folder for data, checkpoints, logs and weights.
            pipeline: Name of the class that samples from the weights.
            data: The dataset.
            video: Size, length and frame rate of clips of one person.
            model: Sizes of the networks.
            sampling: Settings of samples during training, and defaults of the weight store.
            config: Settings of the training.

        Raises:
            ConfigError: Clips of this size cannot be rendered, the VAE's crops do not fit them, the mesh does
                not fit the devices or batch sizes, there is another number of shares than of datasets, or the
                initial store has nothing to take over.
            WeightsError: The initial store is damaged, or has networks of other sizes.
        """
        check_video(video)
        check_shares(config, len(config.people))
        _check_crops(config.vae, video, model)
        self.workdir, self.folder, self.data, self.video = workdir, workdir / config.folder, data, video
        self.encoder_data = replace(data, acting=config.acting)
        self.pipeline, self.model, self.sampling, self.config = pipeline, model, sampling, config
        self.taken, self.stored = _initial_store(config.initial, model)
        slots = {name: slot for name, slot in ENCODERS.items() if slot in model.networks}
        self.encoders = {name: slot for name, slot in slots.items() if slot not in self.taken}
        self.mesh = make_mesh(**config.mesh.axes)
        for stage in (*(getattr(config, name) for name in self.encoders), *config.stages):
            process_rows(stage.batch_size // stage.optimizer.grad_accum_steps, self.mesh)

    def run(self) -> Path:
        """Trains everything, or resumes where an earlier call stopped; returns the weight store.

        Raises:
            ConfigError: The workdir holds a part that was made with other settings.
        """
        for folder in self._stores():  # before anything is trained for nothing
            check_writable_store(folder)
        networks, encoded = self.prepare()
        stages = train_stages(
            networks,
            [encoded[people] for people in self.config.people],
            self.folder,
            mesh=self.mesh,
            fps=self.video.fps,
            sampling=self.sampling,
            config=self.config,
            settings=self.transformer_settings(*self.config.people),
        )
        for index, transformer in stages:
            self._save(self._stores()[index], networks, transformer)
        return self._stores()[-1]

    def prepare(self) -> tuple[Networks, dict[int, Path]]:
        """Makes all that the transformer is trained on, or takes over what an earlier call has made.

        Returns:
            The networks, whose transformer has its initial weights, and the folders of the encoded clips by
            their number of people.

        Raises:
            ConfigError: The workdir holds a part that was made with other settings.
        """
        for name in self.encoders:  # before another part is trained for nothing
            check_resumable(checkpoint_folder(self.workdir / name), self.encoder_settings(name))
        for people in self.config.people:
            check_unchanged(encoded_folder(self._encoded(people)), self.settings(people))
        networks = initial_networks(self.model, seed=self.config.loop.seed, stored=self.stored)
        # Read once; the transformer is read for each training that begins with it.
        networks = networks.replace(**{x: networks[x] for x in ENCODERS.values() if x in self.taken})
        write = partial(write_clips, video=self.video, directory=self.workdir / "data")
        with cli.timed("Clips"):
            shown = write(self.encoder_data) if self.encoders else None
            clips = {people: write(self.data, people=people) for people in self.config.people}
        trained = {
            "speech": ("Speech encoder", self._train_speech_encoder),
            "face": ("Face encoder", self._train_face_encoder),
            "motion": ("Motion encoder", self._train_motion_encoder),
            "detector": ("Face detector", self._train_face_detector),
            "vae": ("VAE", self._train_vae),
        }
        for name in self.encoders:
            title, train_encoder = trained[name]
            with cli.timed(title):
                networks = train_encoder(networks, shown)
        with cli.timed("Encoded clips"):
            encoded = {people: self._encode(networks, clips[people], people) for people in self.config.people}
        return networks, encoded

    def encoder_settings(self, name: str) -> dict[str, Any]:
        """The settings that decide an encoder, but for the number of steps: it can be given more."""
        model = {ENCODERS[name]: self.model.to_config().get(ENCODERS[name])}
        return self._deciding(model, {name: without(getattr(self.config, name), "num_steps")})

    def _encode(self, networks: Networks, clips: Path, people: int) -> Path:
        convert = as_group if "motion_encoder" in networks else dict
        settings = self.settings(people)
        return encode_dataset(networks, clips, self._encoded(people), settings, convert=convert)

    def _encoded(self, people: int) -> Path:
        """Parent folder of the encoded clips of so many people."""
        return self.folder / ("encoded" if people == 1 else f"encoded_{people}")

    def _stores(self) -> list[Path]:
        """The stores that are written, one after each stage."""
        earlier = range(len(self.config.stages) - 1)
        return [self.folder / stage_name(i) / "weights" for i in earlier] + [self.folder / "weights"]

    def settings(self, *people: int) -> dict[str, Any]:
        """The settings that decide the encoded clips of these numbers of people, by their config names."""
        names = (*self.encoders, "acting")
        train = {name: getattr(self.config, name) for name in names} | {"people": people}
        if taken := {slot: found for slot, found in self.taken.items() if slot not in ("transformer", LORA)}:
            train["initial"] = taken
        data = {name: x for count in people for name, x in clip_settings(self.data, count).items()}
        return self._deciding(self.model, train) | {"data": data}

    def transformer_settings(self, *people: int) -> dict[str, Any]:
        """The settings, but for those of the stages, that decide a transformer trained on such clips."""
        settings = self.settings(*people)
        return settings | {"train": settings["train"] | ({"initial": self.taken} if self.taken else {})}

    def _deciding(self, model: Any, train: dict[str, Any]) -> dict[str, Any]:
        seed = {"loop": {"seed": self.config.loop.seed}}
        data = clip_settings(self.encoder_data, 1)  # encoders are trained on clips of one person
        return {"data": data, "video": self.video, "model": model, "train": seed | train}

    def _train_speech_encoder(self, networks: Networks, clips: Path) -> Networks:
        encoder = networks["speech_encoder"]
        regressor = MouthRegressor(encoder, rngs=nnx.Rngs(self.config.loop.seed))
        records = open_split(clips, "train")
        examples = partial(batches, [records], speech_example)
        trained = self._train("speech", regressor, speech_loss, examples, self.config.speech)
        return networks.replace(speech_encoder=trained.encoder)

    def _train_face_encoder(self, networks: Networks, clips: Path) -> Networks:
        config, records = self.config.face, open_split(clips, "train")
        encoder = networks["face_encoder"]
        crop = FacePairs(encoder.config.image_size, config.jitter, config.light)
        rng = np.random.default_rng(self.config.loop.seed)
        initial = range(min(_INITIALISATION_CLIPS, len(records)))
        initialise_norms(encoder, np.concatenate([crop(records[i], rng)["faces"] for i in initial]))
        loss = partial(face_loss, temperature=config.temperature)
        trained = self._train("face", encoder, loss, partial(batches, [records], crop), config)
        return networks.replace(face_encoder=trained)

    def _train_motion_encoder(self, networks: Networks, clips: Path) -> Networks:
        del clips  # it renders its own pictures
        config, seed, size = self.config.motion, self.config.loop.seed, self.video.height
        encoder = networks["motion_encoder"]
        regressor = MotionRegressor(encoder, rngs=nnx.Rngs(seed))
        examples = partial(motion_batches, size, encoder.config.image_size, config)
        trained = self._train("motion", regressor, motion_loss, examples, config).encoder
        finish_norms(trained, size, seed)
        erase_person(trained, size, seed)
        return networks.replace(motion_encoder=trained)

    def _train_face_detector(self, networks: Networks, clips: Path) -> Networks:
        del clips  # it renders its own pictures
        config, detector = self.config.detector, networks["face_detector"]
        examples = partial(detector_batches, self.video.height, detector.config.image_size, config)
        trained = self._train("detector", detector, detector_loss, examples, config)
        return networks.replace(face_detector=trained)

    def _train_vae(self, networks: Networks, clips: Path) -> Networks:
        config, records = self.config.vae, open_split(clips, "train")
        shown = _stack_videos(open_split(clips, "test"), range(NUM_SAMPLES))

        def sample(vae: nnx.Module, folder: Path | None) -> dict[str, np.ndarray]:
            decoded = nnx.jit(lambda vae, video: vae.decode(vae.encode(video)))(vae, from_uint8(shown))
            return {"reconstructed": pairs(shown, to_uint8(np.asarray(decoded)))}

        vae = networks["vae"]
        initial = [records[i] for i in range(min(_INITIALISATION_CLIPS, len(records)))]
        initialise_from_pca(
            vae,
            np.stack([record["video"] for record in initial]),
            np.stack([np.maximum(record["lips"], eye_mask(record)) for record in initial]),
            details_weight=config.details_weight,
            noise=config.noise / 3**0.5,
        )
        crop = RandomCrop(config.crop_size, config.num_frames, config.mouth_fraction)
        loss = partial(vae_loss, config=config)
        examples = partial(batches, [records], crop)
        trained = self._train("vae", vae, loss, examples, config, sample=sample, parameters=VAE_PARAMETERS)
        starts = range(0, min(_NORMALISATION_CLIPS, len(records)), NUM_SAMPLES)
        normalise_latents(trained, [_stack_videos(records, range(i, i + NUM_SAMPLES)) for i in starts])
        return networks.replace(vae=trained)

    def _train(
        self,
        name: str,
        model: nnx.Module,
        loss: Loss,
        examples: Callable[..., Iterator[Batch]],
        config: EncoderStageConfig,
        *,
        sample: Callable[[nnx.Module, Path | None], dict[str, np.ndarray]] | None = None,
        parameters: ParameterRules = ALL_TRAINED,
    ) -> nnx.Module:
        """Trains one encoder in the folder of its name."""
        task = TrainingTask(
            name,
            model,
            loss,
            examples,
            config.batch_size,
            config.num_steps,
            config.optimizer,
            parameters,
            sample=sample,
            settings=self.encoder_settings(name),
        )
        return train(task, self.config.loop, self.workdir / name, self.mesh)

    def _save(self, store: Path, networks: Networks, transformer: WanTransformer) -> None:
        """Writes a weight store in bfloat16: half the size, without a visible effect on samples."""
        trained = {row.slot: transformer.adapters[name] for name, row in self.model.adapters.items()}
        trained["transformer"] = transformer
        for slot in networks:
            network = trained[slot] if slot in trained else networks[slot]
            component = component_of(network.config).name
            save_network(store / slot, cast_parameters(network, jnp.bfloat16), component=component)
        write_pipeline(store, self.pipeline, self.video, self.sampling)


def _initial_store(directory: str, model: ModelConfig) -> tuple[dict[str, str], Networks | None]:
    """What a store has of a model, except for adapters: where it comes from by slot, and the networks.

    A LoRA of the store is merged into its transformer.

    Raises:
        ConfigError: The store has none of the networks, or a transformer that cannot be trained on.
        WeightsError: The store is damaged, or has networks of other sizes.
    """
    if not directory:
        return {}, None
    slots = model.networks.keys() - {row.slot for row in model.adapters.values()}
    origins = store_origins(directory)
    taken = {slot: found for slot, found in origins.items() if slot in slots}
    if not taken:
        raise ConfigError(f"train.initial: {directory} holds none of {', '.join(sorted(slots))}")
    if "transformer" in taken:
        if missing := {"text_encoder", "image_encoder", "vae"} - taken.keys():
            names = ", ".join(sorted(missing))
            raise ConfigError(f"train.initial: {directory} has a transformer, but not its {names}")
        if stored_eight_bit(Path(directory) / "transformer"):
            raise ConfigError(f"train.initial: the transformer in {directory} has 8-bit weights")
    sizes = {slot: model.networks[slot] for slot in taken}
    if "transformer" in taken and LORA in origins:
        taken[LORA] = origins[LORA]
    return taken, stored_networks(directory, ModelConfig(dtype=model.dtype, **sizes))


def _check_crops(config: VAEStageConfig, video: VideoConfig, model: ModelConfig) -> None:
    """Raises a ConfigError if the VAE's crops do not fit the clips or its latents."""
    size, factor = config.crop_size, model.vae.spatial_factor
    if size > video.height or size % factor:
        raise ConfigError(
            f"train.vae.crop_size is {size}; it must be a multiple of {factor} and at most {video.height}"
        )
    if config.num_frames > video.num_frames:
        raise ConfigError(
            f"train.vae.num_frames is {config.num_frames}; it must be at most {video.num_frames}, "
            "video.num_frames"
        )


def _stack_videos(records: Any, indices: range) -> UInt8[np.ndarray, "B T H W 3"]:
    return np.stack([records[i]["video"] for i in indices if i < len(records)])
