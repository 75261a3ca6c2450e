"""FantasyTalking: an image, speech and a prompt become a video.

Source of the steps: fantasy-talking, `infer.py` and `diffsynth/pipelines/wan_video.py`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from fantasy_jax.pipelines.base import (
    AudioInput,
    ImageInput,
    NoiseInput,
    Pipeline,
    StepProgress,
    Timed,
    VideoOutput,
    as_image,
    as_waveform,
    untimed,
)
from fantasy_jax.pipelines.config import SampleConfig, check_motion
from fantasy_jax.preprocessing.face_crop import find_face, points_in_box
from fantasy_jax.preprocessing.images import fit_image
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
        audio: AudioInput,
        prompt: str = "A person is talking.",
        *,
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
        config = self._changed(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            text_guidance_scale=guidance_scale,
            audio_guidance_scale=audio_guidance_scale,
        )
        with timed("Image and audio"):
            portrait, waveform = as_image(image), as_waveform(audio, sampling_rate)
            fitted = fit_image(portrait, self.video.longest_edge)
            video = self.video.for_seconds(waveform.size / SAMPLE_RATE).for_size(fitted.height, fitted.width)
            noise = self._noise(noise, seed, video)
        with self._on_mesh() as networks:
            face = self._encode_face(networks, config, portrait, timed)

            def adapters() -> Mapping[str, Array]:
                samples = waveform[: video.num_samples]
                with timed("Speech encoder"):
                    return face | {"audio": encoders.encode_audio(networks["speech_encoder"], samples)}

            inputs = self._encode(networks, config, fitted, prompt, video, adapters, timed)
            frames, latents = self._generate(
                networks, config, inputs, noise, callback=callback_on_step_end, timed=timed, progress=progress
            )
        source = waveform if isinstance(audio, np.ndarray) else audio
        return VideoOutput(frames, latents, self.video.fps, source, waveform.size / SAMPLE_RATE)

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
