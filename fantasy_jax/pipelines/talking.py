"""FantasyTalking: an image, speech and a prompt become a video.

Source of the steps: fantasy-talking, `infer.py` and `diffsynth/pipelines/wan_video.py`.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from fantasy_jax import media
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.models.halo import num_row_shards
from fantasy_jax.models.tiling import decode, tiled_decode
from fantasy_jax.pipelines.config import SampleConfig, check_motion, read_pipeline
from fantasy_jax.pipelines.latents import initial_noise
from fantasy_jax.preprocessing.face_crop import find_face, points_in_box
from fantasy_jax.preprocessing.images import fit_image, to_pixels, to_uint8
from fantasy_jax.sharding import make_mesh, replicate
from fantasy_jax.system import encoders
from fantasy_jax.system.inputs import ClipInputs, first_frame_condition
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Keep, Networks
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import SAMPLE_RATE, VideoConfig
from fantasy_jax.weights.loading import stored_networks

ImageInput = str | Path | Image.Image | np.ndarray
AudioInput = str | Path | np.ndarray
Timed = Callable[[str], AbstractContextManager]
"""Wraps each stage of the work, by its name, for example to report its duration."""

BUNDLED = Path(__file__).parents[1] / "assets/tiny"
"""The miniature's weights, which come with the package."""
_REQUIRED = ("transformer", "audio_adapter", "vae", "text_encoder", "image_encoder", "speech_encoder")


@dataclass(frozen=True)
class StepProgress:
    """What a callback is told after a sampling step.

    Attributes:
        stage: Name of the stage, `Transformer`.
        step: Steps done, from 1.
        num_steps: Steps in all.
        seconds_left: Estimated from the steps after the first, which includes compilation; None after the
            first.
        latents: `[1, F, h, w, C]`.
    """

    stage: str
    step: int
    num_steps: int
    seconds_left: float | None
    latents: Float[Array, "1 F h w C"]


@dataclass(frozen=True)
class TalkingOutput:
    """A generated clip.

    Attributes:
        frames: RGB, uint8 `[T, H, W, 3]`.
        latents: Final latents, float32, `[1, F, h, w, C]`.
        fps: Frames per second.
        audio: The audio file, or the waveform of 16 kHz, in [-1, 1].
        audio_seconds: Duration of the audio.
    """

    frames: UInt8[np.ndarray, "T H W 3"]
    latents: Float[Array, "1 F h w C"]
    fps: int
    audio: str | Path | np.ndarray
    audio_seconds: float

    @property
    def seconds(self) -> float:
        """Duration of the video."""
        return len(self.frames) / self.fps

    def save(self, path: str | Path) -> None:
        """Writes an mp4 with the audio, cut to the video's length.

        Raises:
            MediaError: The file cannot be written, or the audio cannot be read.
        """
        if not isinstance(self.audio, np.ndarray):
            media.write_video(path, self.frames, self.fps, audio=self.audio)
            return
        with tempfile.TemporaryDirectory() as folder:
            waveform = np.round(np.clip(self.audio, -1, 1) * 32767).astype(np.int16)
            media.write_audio(Path(folder) / "audio.wav", waveform, SAMPLE_RATE)
            media.write_video(path, self.frames, self.fps, audio=Path(folder) / "audio.wav")


class FantasyTalkingPipeline:
    """Makes portraits talk.

    Attributes:
        networks: The networks, by slot.
        video: Size and length of clips.
        config: Settings of sampling, which a call can override.
        mesh: Mesh of the devices.
    """

    def __init__(
        self, networks: Networks, video: VideoConfig, config: SampleConfig, *, keep: Keep | None = None
    ):
        """Puts a pipeline together.

        Args:
            networks: With an audio adapter.
            video: Size and length of clips.
            config: Settings of sampling.
            keep: Networks that stay in memory between calls: `all`, `transformer` or `none`; None: as
                `config` has it.

        Raises:
            ConfigError: A network is missing, or a motion is asked for that the model has no adapter for.
        """
        if missing := [slot for slot in _REQUIRED if slot not in networks]:
            raise ConfigError(f"model.{missing[0]}: is missing; FantasyTalkingPipeline needs it")
        check_motion(networks.config, config)
        self.networks = networks.keeping(config.keep if keep is None else keep)
        self.video, self.config = video, config
        self.mesh = make_mesh(**config.mesh.axes)
        self._sharded: Networks | None = None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path | None = None,
        *,
        model: ModelConfig | None = None,
        video: VideoConfig | None = None,
        config: SampleConfig | None = None,
        dtype: str | None = None,
        keep: Keep = "all",
    ) -> "FantasyTalkingPipeline":
        """A pipeline from a store of weights.

        Args:
            directory: The store; None: the miniature that comes with the package.
            model: Sizes that the store must have; None takes the store's.
            video: Size and length of clips; None takes the store's `pipeline.json`.
            config: Settings of sampling; likewise.
            dtype: Type of weights and products; None: float32 for the bundled miniature, else bfloat16.
            keep: Networks that stay in memory between calls: `all`, `transformer` or `none`.

        Raises:
            WeightsError: The store is missing, incomplete, damaged, or of another pipeline.
        """
        dtype = dtype or ("float32" if directory is None else "bfloat16")
        directory = BUNDLED if directory is None else Path(directory)
        defaults = read_pipeline(directory, cls.__name__)
        video, config = video or defaults[0], config or defaults[1]
        networks = stored_networks(directory, model, dtype=dtype, merge_lora=config.merge_lora)
        return cls(networks, video, config, keep=keep)

    def __call__(
        self,
        image: ImageInput,
        audio: AudioInput,
        prompt: str = "A person is talking.",
        *,
        sampling_rate: int = SAMPLE_RATE,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        audio_guidance_scale: float | None = None,
        seed: int = 0,
        noise: Float[Array, "1 F h w C"] | Callable[[tuple[int, ...]], Array] | None = None,
        callback_on_step_end: Callable[[StepProgress], None] | None = None,
        timed: Timed = lambda name: nullcontext(),
        progress: bool = False,
    ) -> TalkingOutput:
        """Generates a clip.

        Args:
            image: The portrait: a path, a PIL image, or uint8 RGB `[H, W, 3]`.
            audio: The speech: a path, or a waveform in [-1, 1], `[samples]` or `[samples, channels]`.
            prompt: What the video shows.
            sampling_rate: Samples per second of a waveform.
            negative_prompt: What it should not show; None, here and below: as in the pipeline's config.
            num_inference_steps: Sampling steps.
            guidance_scale: Guidance scale of the prompt.
            audio_guidance_scale: Guidance scale of the audio.
            seed: Seed of the initial noise.
            noise: Initial noise in place of the seed's, or a function that makes it, of the latents' shape.
            callback_on_step_end: Called after each sampling step.
            timed: Called with the name of each stage; the stage runs inside the context that it returns.
            progress: Whether to show progress bars.

        Raises:
            ConfigError: A setting is out of range, or the face detector is missing.
            MediaError: The image or audio cannot be read, or the image shows no whole face to a model that
                needs one.
        """
        changes = {
            "negative_prompt": negative_prompt,
            "num_inference_steps": num_inference_steps,
            "text_guidance_scale": guidance_scale,
            "audio_guidance_scale": audio_guidance_scale,
        }
        config = replace(self.config, **{name: x for name, x in changes.items() if x is not None})
        with timed("Image and audio"):
            portrait, waveform = as_image(image), as_waveform(audio, sampling_rate)
            fitted = fit_image(portrait, self.video.longest_edge)
            video = self.video.for_seconds(waveform.size / SAMPLE_RATE).for_size(fitted.height, fitted.width)
            shape = video.latent_shape(1, self.networks.config.vae.latent_channels)
            if callable(noise):
                noise = noise(shape)
            noise = initial_noise(seed, shape) if noise is None else noise
        with self.networks.on_mesh(config.mesh, self.mesh) as networks:
            networks = self._keep_sharded(networks)
            networks = networks.replace(vae=networks["vae"])  # it encodes the image, and decodes the video
            inputs = self._encode(networks, config, portrait, fitted, waveform, prompt, video, timed)
            with timed("Transformer"):
                latents = sample(
                    networks["transformer"],
                    *replicate((noise, inputs)),
                    config,
                    guidance=config.guidance,
                    options=config.adapter_options,
                    progress=progress,
                    callback=_progress(callback_on_step_end, config.num_inference_steps),
                )
            with timed("Latents to video"):
                frames = _decode(networks, latents, config, progress=progress)
        source = waveform if isinstance(audio, np.ndarray) else audio
        return TalkingOutput(frames, latents, self.video.fps, source, waveform.size / SAMPLE_RATE)

    def _keep_sharded(self, networks: Networks) -> Networks:
        """The same sharded networks in every call, since they hold what is kept in memory."""
        if self._sharded is None:
            self._sharded = networks
        return self._sharded

    def _encode(
        self,
        networks: Networks,
        config: SampleConfig,
        portrait: Image.Image,
        fitted: Image.Image,
        waveform: Float[np.ndarray, " samples"],
        prompt: str,
        video: VideoConfig,
        timed: Timed,
    ) -> ClipInputs:
        """All inputs through the encoders; each encoder is released before the next is loaded."""
        adapters: dict[str, Array] = {}
        if networks.config.identity_adapter is not None:
            with timed("Face encoder"):  # first, because it soon finds out that there is no face
                adapters["face"] = encoders.encode_face(networks, portrait, _face_points(portrait, config))
        if networks.config.motion_adapter is not None:
            adapters["motion"] = jnp.array([[config.face_motion, config.body_motion]], jnp.float32)
        with timed("Text encoder"):
            text, negative = encoders.encode_text(networks, [prompt, config.negative_prompt])
        with timed("Image encoder"):
            pixels = jnp.asarray(to_pixels(fitted))
            image = encoders.encode_image(networks, pixels)
        with timed("Speech encoder"):
            adapters["audio"] = encoders.encode_audio(
                networks["speech_encoder"], waveform[: video.num_samples]
            )
        with timed("First frame to latents"):
            latents = encoders.encode_first_frame(networks["vae"], pixels[None], video.num_frames)
            first_frame = first_frame_condition(latents).block_until_ready()
        return ClipInputs(first_frame, text, negative, image, adapters)


def as_image(image: ImageInput) -> Image.Image:
    """An RGB image from a path, a PIL image or an array.

    Raises:
        MediaError: It cannot be read, or is no image.
    """
    if isinstance(image, str | Path):
        return media.read_image(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3:
        return Image.fromarray(image)
    shape = f" of {image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else ""
    raise MediaError(
        f"image: is {type(image).__name__}{shape}; give a path, a PIL image, or uint8 RGB [height, width, 3]"
    )


def as_waveform(audio: AudioInput, sampling_rate: int = SAMPLE_RATE) -> Float[np.ndarray, " samples"]:
    """A mono waveform of 16 kHz from a path or an array.

    Raises:
        MediaError: It cannot be read, is no audio, or is empty.
    """
    if isinstance(audio, str | Path):
        return media.read_audio(audio)
    if not isinstance(audio, np.ndarray) or audio.ndim not in (1, 2) or audio.dtype.kind != "f":
        shape = f" of {audio.dtype} {list(audio.shape)}" if isinstance(audio, np.ndarray) else ""
        raise MediaError(
            f"audio: is {type(audio).__name__}{shape}; give a path, or floats in [-1, 1], [samples] or "
            "[samples, channels]"
        )
    if sampling_rate < 1 or not audio.size or not np.isfinite(audio).all():
        raise MediaError("audio: is empty, not finite, or its sampling_rate is not positive")
    mono = audio if audio.ndim == 1 else audio.mean(axis=1)
    return media.resample(mono.astype(np.float32), sampling_rate, SAMPLE_RATE)


def _face_points(portrait: Image.Image, config: SampleConfig) -> Float[np.ndarray, "5 2"] | None:
    if config.face_box is not None:
        return points_in_box(np.array(config.face_box) * np.tile(portrait.size, 2))
    return find_face(portrait, config.landmarks, number=config.face)


def _decode(
    networks: Networks, latents: Float[Array, "1 F h w C"], config: SampleConfig, *, progress: bool
) -> UInt8[np.ndarray, "T H W 3"]:
    """Latents to frames: by devices that share the rows, or by one device, tile by tile."""
    vae = networks["vae"]
    if num_row_shards() > 1:
        video = decode(vae, replicate(latents))
    else:
        video = tiled_decode(vae, latents, tile=config.tile, stride=config.tile_stride, progress=progress)
    return to_uint8(np.asarray(video[0], np.float32))


def _progress(
    callback: Callable[[StepProgress], None] | None, num_steps: int
) -> Callable[[int, Array], None] | None:
    """The sampler's callback for a user's."""
    if callback is None:
        return None
    begun: list[float] = []

    def report(step: int, latents: Array) -> None:
        latents.block_until_ready()
        begun.append(time.perf_counter())
        left = (begun[-1] - begun[0]) / step * (num_steps - step - 1) if step else None
        callback(StepProgress("Transformer", step + 1, num_steps, left, latents))

    return report
