"""FantasyTalking: an image, speech and a prompt become a video.

Source of the steps: fantasy-talking, `infer.py` and `diffsynth/pipelines/wan_video.py`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from fantasy_jax.errors import ConfigError
from fantasy_jax.pipelines.base import (
    AudioInput,
    ImageInput,
    NoiseInput,
    Pipeline,
    StepProgress,
    Timed,
    untimed,
)
from fantasy_jax.pipelines.config import SampleConfig, check_motion
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.pipelines.sounds import read_sounds
from fantasy_jax.pipelines.speakers import Speakers, find_speakers
from fantasy_jax.pipelines.stream import Blocks, VideoStream
from fantasy_jax.preprocessing.face_crop import find_face, points_in_box
from fantasy_jax.system import encoders
from fantasy_jax.system.networks import Keep, Networks
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import SAMPLE_RATE, VideoConfig

BUNDLED = Path(__file__).parents[1] / "assets/tiny"
"""The miniature's weights, which come with the package."""


class FantasyTalkingPipeline(Pipeline):
    """Makes portraits talk."""

    required = (*Pipeline.required, "audio_adapter", "speech_encoder")
    config_type = SampleConfig
    bundled = BUNDLED

    def __init__(
        self, networks: Networks, video: VideoConfig, config: SampleConfig, *, keep: Keep | None = None
    ):
        """As every pipeline; ConfigError if a motion is asked for that the model has no adapter for."""
        super().__init__(networks, video, config, keep=keep)
        check_motion(networks.config, config)

    def __call__(
        self,
        image: ImageInput,
        audio: AudioInput | Sequence[AudioInput],
        prompt: str = "A person is talking.",
        *,
        people: Sequence[int] = (),
        boxes: Sequence[Float[np.ndarray, "4"] | Sequence[float]] = (),
        size: tuple[int, int] | None = None,
        voice: AudioInput | Sequence[AudioInput] | None = None,
        sampling_rate: int = SAMPLE_RATE,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        audio_guidance_scale: float | None = None,
        seed: int = 0,
        noise: NoiseInput = None,
        callback_on_step_end: Callable[[StepProgress], None] | None = None,
        timed: Timed = untimed,
        progress: bool = False,
    ) -> VideoOutput:
        """Generates a clip.

        Args:
            image: The portrait: a path, a PIL image, or uint8 RGB `[H, W, 3]`.
            audio: The speech: a path, or a waveform in [-1, 1], `[samples]` or `[samples, channels]`. A list:
                that of several people, from left to right; the video plays all of it together.
            prompt: What the video shows.
            people: The number of the person, from 1, that each sound belongs to; those without a sound keep
                still. Without boxes people are counted from the left. Neither people nor boxes, and one
                sound: it belongs to the whole picture.
            boxes: Left, top, right and bottom of each person's face as fractions of the picture, for pictures
                in which no detector finds the right faces; person n is the n-th box.
            size: Height and width of the clip, in pixels: the middle of the picture is shown, and boxes are
                fractions of that. None: the whole picture, in the size of the pipeline.
            voice: The separated voice of each sound. It conditions the model, and `audio` is played.
            sampling_rate: Samples per second of waveforms.
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
            ConfigError: A setting is out of range, the face detector is missing, boxes overlap, a person does
                not exist or is named twice, or the numbers of sounds, voices and people differ.
            MediaError: The image or audio cannot be read, there are more sounds than people in the image, or
                it shows no whole face to a model that needs one.
        """
        config = self._changed(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            text_guidance_scale=guidance_scale,
            audio_guidance_scale=audio_guidance_scale,
        )
        with timed("Image and audio"):
            portrait, fitted = self._picture(image, size)
            sounds = read_sounds(audio, voice, sampling_rate, config.max_seconds, config.start)
            window = self.video.for_size(fitted.height, fitted.width)
            video = window.for_seconds(sounds.seconds)
            windows = config.windows(video, window)
            speakers = self._speakers(portrait, fitted, len(sounds.waveforms), boxes, people)
            labels = speakers.labels(video.latent_frames)
            noise = self._noise(noise, seed, video)
        with self._on_mesh() as networks:
            face = self._encode_face(networks, config, portrait, timed)

            def adapters() -> Mapping[str, Array]:
                with timed("Speech encoder"):
                    length = video.num_samples if windows else min(video.num_samples, sounds.num_samples)
                    features = sounds.encode(networks["speech_encoder"], length)
                return face | {"audio": features[:, 0] if labels is None else features}

            inputs = self._encode(networks, config, [fitted], prompt, video, adapters, timed)
            if labels is not None:
                owners = {"audio": jnp.asarray([speakers.targets], jnp.int32)}
                inputs = replace(inputs, labels=jnp.asarray(labels[None]), owners=owners)
            decode, latents = self._generate(
                networks,
                config,
                inputs,
                noise,
                windows,
                callback=callback_on_step_end,
                timed=timed,
                progress=progress,
            )
        # A clip of several windows ends with the sound.
        num_frames = video.num_frames if windows is None else math.ceil(sounds.seconds * video.fps - 1e-6)
        return VideoOutput(decode, latents, num_frames, video.fps, sounds.played, sounds.seconds, sounds.rate)

    def stream(
        self,
        image: ImageInput,
        audio_chunks: Iterable[Float[np.ndarray, " _"]],
        prompt: str = "A person is talking.",
        *,
        windows_per_block: int = 1,
        seed: int = 0,
    ) -> VideoStream:
        """Frames of speech while it is spoken, or of speech without end; the rest is as of a call.

        Args:
            image: The portrait.
            audio_chunks: Speech at 16 kHz, in [-1, 1], in pieces of any length.
            prompt: What the video shows.
            windows_per_block: Windows of a block. More have fewer seams and a longer latency.
            seed: Seed of the initial noise.

        Returns:
            An iterable of uint8 `[T, H, W, 3]`, with its latencies. Iterating samples block after block, and
            raises a MediaError if there is no sound.

        Raises:
            ConfigError: A setting is out of range, or the mesh has several devices.
            MediaError: The image cannot be read, or shows no whole face to a model that needs one.
        """
        if self.mesh.size > 1:
            raise ConfigError("sample.mesh: a stream is sampled by one device; leave the mesh at 1")
        if windows_per_block < 1:
            raise ConfigError(f"windows_per_block is {windows_per_block}; it must be at least 1")
        portrait, fitted = self._picture(image)
        window = self.video.for_size(fitted.height, fitted.width)
        blocks = Blocks(window, self.config, windows_per_block)
        with self._on_mesh() as networks:
            face = self._encode_face(networks, self.config, portrait, untimed)
            inputs = self._encode(networks, self.config, [fitted], prompt, window, lambda: face, untimed)
            return VideoStream(networks, inputs, blocks, audio_chunks, seed, self.calibration)

    def _speakers(
        self,
        portrait: Image.Image,
        fitted: Image.Image,
        count: int,
        boxes: Sequence[Float[np.ndarray, "4"] | Sequence[float]],
        people: Sequence[int],
    ) -> Speakers:
        placed = [np.asarray(box, np.float64) for box in boxes]
        landmarks = self.config.landmarks
        speakers = find_speakers(portrait, fitted, count, boxes=placed, people=people, landmarks=landmarks)
        for note in speakers.notes:
            logging.getLogger(__name__).warning(note)
        return speakers

    def _encode_face(
        self,
        networks: Networks,
        config: SampleConfig,
        portrait: Image.Image,
        timed: Timed,
        points: Float[np.ndarray, "5 2"] | None = None,
    ) -> dict[str, Array]:
        """Inputs of the identity and motion adapters, if the model has them.

        Args:
            networks: On the mesh.
            config: Settings of this call.
            portrait: RGB.
            timed: Wraps each stage.
            points: Five points of the face, where they are known (`landmarks.five_points`).
        """
        adapters: dict[str, Array] = {}
        if networks.config.identity_adapter is not None:
            with timed("Face encoder"):  # first, because it soon finds out that there is no face
                points = _face_points(portrait, config) if points is None else points
                adapters["face"] = encoders.encode_face(networks, portrait, points)
        if networks.config.motion_adapter is not None:
            adapters["motion"] = jnp.array([[config.face_motion, config.body_motion]], jnp.float32)
        return adapters


def _face_points(portrait: Image.Image, config: SampleConfig) -> Float[np.ndarray, "5 2"] | None:
    if config.face_box is not None:
        return points_in_box(np.array(config.face_box) * np.tile(portrait.size, 2))
    return find_face(portrait, config.landmarks, number=config.face)
