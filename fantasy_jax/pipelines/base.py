"""What the pipelines share: weights and mesh, inputs and outputs, and the way from conditions to frames."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from fantasy_jax import media
from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.diffusion.magcache import Calibration
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.diffusion.windows import WindowSchedule
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.pipelines.config import PipelineConfig, read_pipeline
from fantasy_jax.pipelines.latents import initial_noise
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.preprocessing.images import fit_picture, to_pixels
from fantasy_jax.sharding import make_mesh, replicate
from fantasy_jax.system import encoders
from fantasy_jax.system.inputs import ClipInputs, first_frame_condition
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Keep, Networks, check_memory
from fantasy_jax.system.streaming import StreamingDecoder
from fantasy_jax.typing import Array, Bool, Float, UInt8
from fantasy_jax.video import SAMPLE_RATE, VideoConfig, video_frames
from fantasy_jax.weights.inspect import store_origins
from fantasy_jax.weights.loading import stored_networks
from fantasy_jax.weights.lora import LoRAFile, lora_origin, parse_lora
from fantasy_jax.weights.store import LORA

ImageInput = str | Path | Image.Image | np.ndarray
AudioInput = str | Path | np.ndarray
NoiseInput = Float[Array, "1 F h w C"] | Callable[[tuple[int, ...]], Array] | None
"""Initial noise, a function that makes it of the latents' shape, or None for that of a seed."""
Timed = Callable[[str], AbstractContextManager]
"""Wraps each stage of the work, by its name, for example to report its duration."""


def untimed(name: str) -> AbstractContextManager:
    """A `Timed` that reports nothing."""
    del name
    return nullcontext()


@dataclass(frozen=True)
class StepProgress:
    """What a callback is told after a sampling step.

    Attributes:
        stage: Name of the stage, `Transformer`.
        step: Steps done, from 1.
        num_steps: Steps in all.
        seconds_left: Estimated from the steps after the first of the clip, which includes compilation; None
            after that.
        latents: `[1, F, h, w, C]`; the next step takes their memory.
        preview: The clip as this step predicts it, without sound. Its frames are decoded when they are
            needed, by the store's preview decoder or, without one, by the VAE, and can be a few more than
            those of the result.
    """

    stage: str
    step: int
    num_steps: int
    seconds_left: float | None
    latents: Float[Array, "1 F h w C"]
    preview: VideoOutput


AnyPipeline = TypeVar("AnyPipeline", bound="Pipeline")


class Pipeline:
    """Networks, settings and the mesh, which stay the same from clip to clip.

    Attributes:
        required: Slots of the networks that the pipeline needs.
        config_type: Class of its settings.
        bundled: Folder of the weights that come with the package; None if there are none.
        stored_as: Name of the pipeline in stores of weights; None: the class's.
        networks: The networks, by slot.
        video: Size and length of clips.
        config: Settings of sampling, which a call can override.
        mesh: Mesh of the devices.
        origins: Where the weights of each network come from (`weights.inspect.store_origins`); empty if they
            are not from a store.
        calibration: Measures MagCache's curve on every clip, or block of a stream, that is sampled; None: not
            measured.
    """

    required: ClassVar[Sequence[str]] = ("transformer", "vae", "text_encoder", "image_encoder")
    config_type: ClassVar[type[PipelineConfig]] = PipelineConfig
    bundled: ClassVar[Path | None] = None
    stored_as: ClassVar[str | None] = None

    def __init__(
        self, networks: Networks, video: VideoConfig, config: PipelineConfig, *, keep: Keep | None = None
    ):
        """Puts a pipeline together.

        Args:
            networks: All that are `required`.
            video: Size and length of clips.
            config: Settings of sampling.
            keep: Networks that stay in memory between calls: `all`, `transformer` or `none`; None: as
                `config` has it.

        Raises:
            ConfigError: A network is missing, or weights of several devices are to lie in the host's memory.
        """
        if missing := [slot for slot in self.required if slot not in networks]:
            raise ConfigError(f"model.{missing[0]}: is missing; {type(self).__name__} needs it")
        networks = networks.with_dtypes(vae=config.vae_dtype)
        self.networks = networks.keeping(config.keep if keep is None else keep)
        self.video, self.config = video, config
        self.mesh = make_mesh(**config.mesh.axes)
        check_memory(config.weights_memory, self.mesh)
        self.origins: dict[str, str] = {}
        self.calibration: Calibration | None = None
        self._said_origins = False
        self._sharded: Networks | None = None

    @classmethod
    def from_pretrained(
        cls: type[AnyPipeline],
        directory: str | Path | None = None,
        *,
        model: ModelConfig | None = None,
        video: VideoConfig | None = None,
        config: PipelineConfig | None = None,
        dtype: str | None = None,
        keep: Keep = "all",
        loras: Sequence[LoRAFile | str | Path] | None = None,
    ) -> AnyPipeline:
        """A pipeline from a store of weights.

        Args:
            directory: The store; None: the weights that come with the package.
            model: Sizes that the store must have; None takes the store's.
            video: Size and length of clips; None takes the store's `pipeline.json`.
            config: Settings of sampling; likewise.
            dtype: Type of weights and products; None: float32 for the bundled weights, else bfloat16.
            keep: Networks that stay in memory between calls: `all`, `transformer` or `none`.
            loras: LoRA files that are added to the transformer, each a `LoRAFile`, `FILE` or `FILE:STRENGTH`;
                None: those of `config`.

        Raises:
            ConfigError: No directory is given, and no weights come with the package.
            WeightsError: The store is missing, incomplete, damaged, or of another pipeline; or a LoRA file is
                missing, damaged or for another transformer.
        """
        if directory is None and cls.bundled is None:
            raise ConfigError(f"{cls.__name__}: has no bundled weights; name the folder of a store")
        dtype = dtype or ("float32" if directory is None else "bfloat16")
        directory = cls.bundled if directory is None else Path(directory)
        defaults = read_pipeline(directory, cls.stored_as or cls.__name__, cls.config_type)
        video, config = video or defaults[0], config or defaults[1]
        if loras is not None:
            files = (file if isinstance(file, LoRAFile) else parse_lora(str(file)) for file in loras)
            config = replace(config, loras=tuple(files))
        networks = stored_networks(
            directory,
            model,
            dtype=dtype,
            merge_lora=config.merge_lora,
            loras=config.loras,
            weights_memory=config.weights_memory,
            eight_bit_products=config.eight_bit_products,
        )
        pipeline = cls(networks, video, config, keep=keep)
        used = (*networks.config.networks, LORA)
        pipeline.origins = {slot: x for slot, x in store_origins(directory).items() if slot in used}
        for index, file in enumerate(config.loras, 1):
            pipeline.origins[f"LoRA file {index}"] = lora_origin(file)
        return pipeline

    def _print_origins(self) -> None:
        """Prints, once, where the weights come from."""
        if not self._said_origins:
            for slot, origin in self.origins.items():
                print(f"{slot + ' ':.<20} {origin}", flush=True)
        self._said_origins = True

    def _changed(self, **changes: Any) -> Any:
        """The settings with some of them overridden; None leaves a setting as it is."""
        return replace(self.config, **{name: x for name, x in changes.items() if x is not None})

    @contextmanager
    def _on_mesh(self) -> Iterator[Networks]:
        """The networks, sharded over the mesh where it has several devices."""
        with self.networks.on_mesh(self.config.mesh, self.mesh) as networks:
            # The same sharded networks in every call, since they hold what is kept in memory.
            self._sharded = networks if self._sharded is None else self._sharded
            yield self._sharded

    def _picture(
        self, image: ImageInput, size: tuple[int, int] | None = None
    ) -> tuple[Image.Image, Image.Image]:
        """What is shown of a picture, and that in the size that is generated (`images.fit_picture`)."""
        name = image if isinstance(image, str | Path) else "image"
        return fit_picture(as_image(image), self.video.longest_edge, size, name=name)

    def _noise(self, noise: NoiseInput, seed: int, video: VideoConfig) -> Float[Array, "1 F h w C"]:
        shape = video.latent_shape(1, self.networks.config.vae.latent_channels)
        if noise is None:
            return initial_noise(seed, shape)
        return noise(shape) if callable(noise) else noise

    def _encode(
        self,
        networks: Networks,
        config: PipelineConfig,
        images: Sequence[Image.Image],
        prompt: str,
        video: VideoConfig,
        adapters: Callable[[], Mapping[str, Array]],
        timed: Timed,
    ) -> ClipInputs:
        """Prompts, images and adapters' inputs through the encoders.

        Each encoder is released before the next is loaded.

        Args:
            networks: On the mesh.
            config: Settings of this call.
            images: First frames, of the size that is generated: one, or one for each reference of windows.
            prompt: What the video shows.
            video: Size and length of the clip.
            adapters: Makes the inputs of adapters, after the text and the image are encoded.
            timed: Wraps each stage.
        """
        with timed("Text encoder"):
            prompts = [prompt, config.negative_prompt] if config.needs_negative_prompt else [prompt]
            text, *negative = encoders.encode_text(networks, prompts)
        with timed("Image encoder"):
            pixels = [jnp.asarray(to_pixels(image)) for image in images]
            encoded = jnp.concatenate([encoders.encode_image(networks, x) for x in pixels])
        given = dict(adapters())
        with timed("First frame to latents"):
            num_frames = min(video.num_frames, self.video.num_frames)  # those of a window
            latents = [encoders.encode_first_frame(networks, x[None], num_frames) for x in pixels]
            first_frame = first_frame_condition(jnp.concatenate(latents)).block_until_ready()
        return ClipInputs(first_frame, text, negative[0] if negative else text, encoded, given)

    def _generate(
        self,
        networks: Networks,
        config: PipelineConfig,
        inputs: ClipInputs,
        noise: Float[Array, "1 F h w C"],
        windows: WindowSchedule | None,
        *,
        held: HeldLatents | None = None,
        strength: float = 1.0,
        callback: Callable[[StepProgress], None] | None,
        timed: Timed,
        progress: bool,
    ) -> tuple[Callable[[], Iterator[UInt8[np.ndarray, "H W 3"]]], Float[Array, "1 F h w C"]]:
        """Noise to latents; returns a function that decodes them, and the latents (`VideoOutput`)."""
        if progress:
            seconds = video_frames(noise.shape[1]) / self.video.fps
            self._print_origins()
            first = config.first_step(held, strength)
            evaluations = config.evaluation_plan(config.guidance, first).evaluations[first:]
            print(_plan(seconds, windows.count if windows else 1, evaluations), flush=True)
        kept = networks.for_stage()  # for all previews of the clip
        with timed("Transformer"):
            latents = sample(
                networks["transformer"],
                *replicate((noise, inputs)),
                config,
                guidance=config.guidance,
                options=config.adapter_options,
                windows=windows,
                held=None if held is None else replicate(held),
                strength=strength,
                progress=progress,
                callback=_progress(
                    callback, config.num_inference_steps, partial(self._preview, kept, config)
                ),
                residual_callback=self.calibration,
            )
        return partial(self._decode, latents, config, progress=progress), latents

    def decode(
        self,
        latents: Float[Array, "1 F h w C"],
        num_frames: int | None = None,
        *,
        audio: AudioInput | None = None,
        audio_seconds: float = 0.0,
        audio_rate: int = SAMPLE_RATE,
        progress: bool = False,
    ) -> VideoOutput:
        """The clip of latents that were sampled before, such as those of `latents.read_latents`.

        Args:
            latents: The latents.
            num_frames: Frames of the video; None: all that the latents hold.
            audio: The audio file, or the waveform in [-1, 1]; None for a silent clip.
            audio_seconds: Duration of the audio.
            audio_rate: Sampling rate of the waveform, in Hz.
            progress: Whether to show a progress bar.
        """
        if progress:
            self._print_origins()
        frames = video_frames(latents.shape[1]) if num_frames is None else num_frames
        decode = partial(self._decode, latents, self.config, progress=progress)
        return VideoOutput(decode, latents, frames, self.video.fps, audio, audio_seconds, audio_rate)

    def _preview(
        self, networks: Networks, config: PipelineConfig, latents: Float[Array, "1 F h w C"]
    ) -> VideoOutput:
        """The clip of predicted latents, decoded by one of `networks`."""
        decode = partial(self._decode, latents, config, networks, preview=True, progress=False)
        return VideoOutput(decode, latents, video_frames(latents.shape[1]), self.video.fps)

    def _decode(
        self,
        latents: Float[Array, "1 F h w C"],
        config: PipelineConfig,
        networks: Networks | None = None,
        *,
        preview: bool = False,
        progress: bool,
    ) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the frames of latents, decoded by the mesh.

        Args:
            latents: Normalised.
            config: Settings of the call.
            networks: On the mesh; None: the pipeline's.
            preview: Whether the preview decoder decodes, without tiles, if there is one.
            progress: Whether to show a progress bar.
        """
        with self._on_mesh() as sharded:
            networks = sharded if networks is None else networks
            slot = "preview_decoder" if preview and "preview_decoder" in networks else "vae"
            decoder = StreamingDecoder(networks[slot], **config.decoding)
            plan, chunks = decoder.plan(latents), decoder.chunks(latents)
        what = f"Decoding in {len(plan.tiles)} tiles" if plan.in_tiles else "Decoding"
        with tqdm(total=latents.shape[1], desc=what, unit="latent frame", disable=not progress) as bar:
            for chunk in chunks:
                # The mesh is not set while the caller has a frame.
                with self.networks.on_mesh(self.config.mesh, self.mesh):
                    decoded = list(decoder(replicate(latents[:, chunk])))
                bar.update(chunk.stop - chunk.start)  # before the caller gets the last frame, and may stop
                for frames in decoded:
                    yield from frames


def _plan(seconds: float, windows: int, evaluations: Bool[np.ndarray, "steps branches"]) -> str:
    """How much work a clip is."""
    factors = windows, *evaluations.shape
    product = " x ".join(map(str, factors))
    total, count = math.prod(factors), windows * int(evaluations.sum())
    made = f", of which {count} are made" if count < total else ""
    return (
        f"{seconds:.2f} s of video: {total} evaluations of the transformer ({product}: windows, steps, "
        f"branches of guidance){made}"
    )


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


def as_waveform(
    audio: AudioInput,
    sampling_rate: int = SAMPLE_RATE,
    rate: int = SAMPLE_RATE,
    *,
    start: float = 0.0,
    seconds: float = math.inf,
) -> Float[np.ndarray, " samples"]:
    """A mono waveform of `rate` Hz from a path, or from an array of `sampling_rate` Hz.

    Args:
        audio: A path, or floats in [-1, 1], `[samples]` or `[samples, channels]`.
        sampling_rate: Samples per second of an array.
        rate: Samples per second of the result.
        start: Seconds that are left out.
        seconds: What is needed of it; little more than this is read of a file.

    Raises:
        MediaError: It cannot be read, is no audio, or is empty.
    """
    if isinstance(audio, str | Path):
        return media.read_audio(audio, rate, start=start, seconds=seconds)
    if not isinstance(audio, np.ndarray) or audio.ndim not in (1, 2) or audio.dtype.kind != "f":
        shape = f" of {audio.dtype} {list(audio.shape)}" if isinstance(audio, np.ndarray) else ""
        raise MediaError(
            f"audio: is {type(audio).__name__}{shape}; give a path, or floats in [-1, 1], [samples] or "
            "[samples, channels]"
        )
    if sampling_rate < 1 or not audio.size or not np.isfinite(audio).all():
        raise MediaError("audio: is empty, not finite, or its sampling_rate is not positive")
    audio = audio[round(start * sampling_rate) :]
    if not audio.size:
        raise MediaError(f"audio: ends before {start:g} s, from which on it is used")
    mono = audio if audio.ndim == 1 else audio.mean(axis=1)
    return media.resample(mono.astype(np.float32), sampling_rate, rate)


def _progress(
    callback: Callable[[StepProgress], None] | None, num_steps: int, preview: Callable[[Array], VideoOutput]
) -> Callable[[int, Array, Array], None] | None:
    """The sampler's callback for a user's; `preview` makes the clip of predicted latents."""
    if callback is None:
        return None
    begun: list[float] = []

    def report(step: int, latents: Array, predicted: Array) -> None:
        latents.block_until_ready()
        begun.append(time.perf_counter())
        timed = len(begun) - 1  # sampling need not start from the first step
        left = (begun[-1] - begun[0]) / timed * (num_steps - step - 1) if timed else None
        callback(StepProgress("Transformer", step + 1, num_steps, left, latents, preview(predicted)))

    return report
