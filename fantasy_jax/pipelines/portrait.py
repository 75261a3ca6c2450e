"""FantasyPortrait: a picture and driving videos become a video, in which one or several people act.

Source of the steps: fantasy-portrait, `infer.py`, `infer_multi.py` and `diffsynth/pipelines/wan_video.py`.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fantasy_jax import media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.pipelines.base import (
    ImageInput,
    NoiseInput,
    Pipeline,
    StepProgress,
    Timed,
    untimed,
)
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.pipelines.output import VideoOutput
from fantasy_jax.pipelines.scene import DriverInput, Scene, make_scene
from fantasy_jax.preprocessing.driving import DrivingVideo
from fantasy_jax.system import encoders
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import TEMPORAL_FACTOR

BUNDLED = Path(__file__).parents[1] / "assets/tiny_portrait"
"""The portrait miniature's weights, which come with the package."""


class FantasyPortraitPipeline(Pipeline):
    """Makes the people of a picture act as those of driving videos."""

    required = (*Pipeline.required, "expression_adapter", "motion_encoder")
    config_type = PortraitSampleConfig
    bundled = BUNDLED

    def scene(
        self,
        image: ImageInput,
        drivers: DriverInput | Sequence[DriverInput],
        *,
        boxes: Sequence[Float[np.ndarray, "4"] | Sequence[float]] = (),
        people: Sequence[int] = (),
        size: tuple[int, int] | None = None,
        progress: bool = False,
    ) -> Scene:
        """Says who is driven by whom, which takes seconds, so that it can be checked before a clip is made.

        Args:
            image: The picture: a path, a PIL image, or uint8 RGB `[H, W, 3]`.
            drivers: A driving video or several: paths of videos or pictures, or uint8 RGB `[T, H, W, 3]` at
                the pipeline's frame rate.
            boxes: Left, top, right and bottom of each person's face as fractions of the picture, for pictures
                in which no detector finds the right faces; person n is the n-th box.
            people: The number of the person, from 1, that each driver drives. Without boxes people are
                counted from the left.
            size: Height and width of the clip, in pixels: the middle of the picture is shown, and boxes are
                fractions of that. None: the whole picture, in the size of the pipeline.
            progress: Whether to show progress bars.

        Raises:
            ConfigError: Boxes overlap, a person does not exist or is named twice, or the face detector is
                missing.
            MediaError: An input cannot be read, a driver shows no face or is too short, or there are more
                drivers than people in the picture.
        """
        several = [drivers] if isinstance(drivers, str | Path | np.ndarray) else list(drivers)
        seconds, fps = self.config.max_seconds, self.video.fps
        shown, fitted = self._picture(image, size)
        with self._on_mesh() as networks:
            scene = make_scene(
                shown,
                several,
                fitted=fitted,
                video=self.video,
                config=self.config.driving,
                own=networks.get("face_detector"),
                start=self.config.start,
                max_frames=sys.maxsize if seconds is None else math.ceil(seconds * fps - 1e-6),
                boxes=[np.asarray(box, np.float64) for box in boxes],
                targets=people,
                progress=progress,
            )
        if seconds is not None and scene.num_frames + TEMPORAL_FACTOR <= seconds * fps:
            raise MediaError(
                f"the drivers last {scene.num_frames / fps:.2f} s, less than the {seconds:g} s of --seconds "
                "or sample.max_seconds; ask for less, or leave it out to use all"
            )
        return scene

    def __call__(
        self,
        image: ImageInput | Scene,
        drivers: DriverInput | Sequence[DriverInput] | None = None,
        prompt: str = "",
        *,
        boxes: Sequence[Float[np.ndarray, "4"] | Sequence[float]] = (),
        people: Sequence[int] = (),
        sound: str | Path | None = None,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        expression_guidance_scale: float | None = None,
        seed: int = 0,
        noise: NoiseInput = None,
        callback_on_step_end: Callable[[StepProgress], None] | None = None,
        timed: Timed = untimed,
        progress: bool = False,
    ) -> VideoOutput:
        """Generates a clip.

        Args:
            image: The picture, or a `scene`, which takes the place of image, drivers, boxes and people.
            drivers: As of `scene`.
            prompt: What the video shows; the official scripts leave it empty.
            boxes: As of `scene`.
            people: As of `scene`.
            sound: Audio file, or a video with audio; None: that of the first driver that has any.
            negative_prompt: What it should not show; None, here and below: as in the pipeline's config.
            num_inference_steps: Sampling steps.
            guidance_scale: Guidance scale of the prompt.
            expression_guidance_scale: Guidance scale of the expression.
            seed: Seed of the initial noise.
            noise: Initial noise in place of the seed's, or a function that makes it, of the latents' shape.
            callback_on_step_end: Called after each sampling step.
            timed: Called with the name of each stage; the stage runs inside the context that it returns.
            progress: Whether to show progress bars.

        Raises:
            ConfigError: A setting is out of range, or as of `scene`.
            MediaError: The sound cannot be read, or as of `scene`.
        """
        config = self._changed(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            text_guidance_scale=guidance_scale,
            expression_guidance_scale=expression_guidance_scale,
        )
        if sound is not None:  # a file that cannot be read is found before the clip is made
            sound = media.audio_part(sound, config.start)
            media.check_audio(sound, config.max_seconds or math.inf)
        if isinstance(image, Scene):
            scene = image
            if drivers is not None or len(boxes) or len(people):
                raise ConfigError(
                    "drivers, boxes and people belong to the scene that is given; leave them out"
                )
        elif drivers is None:
            raise ConfigError("drivers: is missing; give a driving video, or a scene in place of the image")
        else:
            with timed("Driving videos"):
                scene = self.scene(image, drivers, boxes=boxes, people=people, progress=progress)
        seconds = scene.num_frames / self.video.fps
        sound = _sound(scene, config.start, seconds) if sound is None else sound
        size = scene.picture.height, scene.picture.width
        video = replace(self.video, num_frames=scene.num_frames).for_size(*size)
        windows = config.windows(video, self.video)
        noise = self._noise(noise, seed, video)
        with self._on_mesh() as networks:

            def adapters() -> Mapping[str, Array]:
                with timed("Motion encoder"):
                    faces = scene.faces(networks.config.motion_encoder.image_size)
                    return {"expression": encoders.encode_motion(networks["motion_encoder"], faces)}

            inputs = self._encode(networks, config, [scene.picture], prompt, video, adapters, timed)
            if (labels := scene.labels()) is not None:
                owners = {"expression": jnp.asarray([scene.targets], jnp.int32)}
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
        return VideoOutput(decode, latents, video.num_frames, video.fps, sound)


def _sound(scene: Scene, start: float, seconds: float) -> str | media.AudioPart | None:
    """The first driver whose first seconds of audio can be read."""
    for driver in scene.drivers:
        if isinstance(driver.frames, DrivingVideo):
            try:
                media.check_audio(media.audio_part(driver.name, start), seconds)
            except MediaError:  # a picture, or a silent video
                continue
            return media.audio_part(driver.name, start)
    return None
