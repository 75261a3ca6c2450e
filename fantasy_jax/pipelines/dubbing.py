"""Dubbing: the speaker of a video says something else, and the rest of the video stays as it is.

The latents of the source are kept outside a mask of the lower face, at each step's noise level; the result is
pasted into the source with a soft edge.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from PIL import Image

from fantasy_jax import media
from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.diffusion.windows import WindowSchedule
from fantasy_jax.errors import ConfigError
from fantasy_jax.pipelines.base import AudioInput, NoiseInput, StepProgress, Timed, as_waveform, untimed
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.dubbed_video import DubbedScene, DubbedVideo
from fantasy_jax.pipelines.dubbing_plan import DubbingPlan, SceneReader, plan_dubbing
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.preprocessing.dubbing import FrameRates, Speaker, at_indices, generated_masks, match_rates
from fantasy_jax.preprocessing.face_masks import MaskMode, latent_mask
from fantasy_jax.system import encoders
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.networks import Networks
from fantasy_jax.system.streaming import encode_stream
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import SAMPLE_RATE, VideoConfig, audio_samples, video_frames

MAX_FPS = 24
"""Largest frame rate of a source at which the model runs; the released weights are trained at 23."""
Crop = UInt8[np.ndarray, "S S 3"]
"""The crop in one frame of the source, in the size that is generated."""


class FantasyDubbingPipeline(FantasyTalkingPipeline):
    """Makes the speaker of a video say something else, with FantasyTalking's weights."""

    stored_as: ClassVar[str] = "FantasyTalkingPipeline"

    def __call__(
        self,
        video: str | Path,
        audio: AudioInput,
        prompt: str = "A person is talking.",
        *,
        mask: MaskMode = "mouth",
        strength: float | None = None,
        people: Sequence[int] = (),
        boxes: Sequence[Float[np.ndarray, "4"]] = (),
        background: str | Path | None = None,
        sampling_rate: int = SAMPLE_RATE,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        audio_guidance_scale: float | None = None,
        seed: int = 0,
        noise: NoiseInput = None,
        latents: Float[Array, "1 F h w C"] | None = None,
        callback_on_step_end: Callable[[StepProgress], None] | None = None,
        timed: Timed = untimed,
        progress: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> DubbedVideo:
        """Dubs a video.

        Args:
            video: The source, a path.
            audio: The new speech: a path, or a waveform in [-1, 1], `[samples]` or `[samples, channels]`.
            prompt: What the video shows.
            mask: What is generated: the lower face, the whole face, or everything around the face.
            strength: Noise level to start from, in [0, 1]; None, here and below: as in the pipeline's config.
            people: Who speaks where a scene shows several, from 1, from left to right, for all scenes, or one
                for each; 0 leaves a scene as it is.
            boxes: The speaker's head instead, as fractions of the frame (`plan_dubbing`).
            background: File whose audio is mixed with the new speech.
            sampling_rate: Samples per second of a waveform.
            negative_prompt: What the video should not show.
            num_inference_steps: Steps of the whole schedule.
            guidance_scale: Guidance scale of the prompt.
            audio_guidance_scale: Guidance scale of the audio.
            seed: Seed of the initial noise of each scene.
            noise: Initial noise in place of the seed's, or a function that makes it, of the latents' shape.
            latents: Latents of all scenes, from an earlier call with the same video, audio, mask, people and
                boxes (`DubbedVideo.latents`); nothing is sampled then.
            callback_on_step_end: Called after each sampling step.
            timed: Called with the name of each stage; the stage runs inside the context that it returns.
            progress: Whether to show progress bars.
            report: Called with each note of the plan before sampling.

        Raises:
            ConfigError: A setting is out of range or does not fit the video, the face detector is missing,
                or `latents` are not of these scenes.
            MediaError: Video or audio cannot be read, or nothing can be dubbed (`plan_dubbing`).
        """
        config = self._changed(
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            text_guidance_scale=guidance_scale,
            audio_guidance_scale=audio_guidance_scale,
            strength=strength,
        )
        with timed("Video and audio"):
            used = math.inf if config.max_seconds is None else config.max_seconds
            waveform = as_waveform(audio, sampling_rate, start=config.start, seconds=used)
            waveform = waveform[: None if used == math.inf else round(used * SAMPLE_RATE)]
            if background is not None:
                media.check_audio(background)
            seconds = waveform.size / SAMPLE_RATE
            plan = plan_dubbing(
                video,
                seconds,
                mask=mask,
                config=config.landmarks,
                people=people,
                boxes=boxes,
                progress=progress,
            )
        if report is not None:
            for note in plan.notes:
                report(note)
        clips = self._clips(config, plan, waveform)
        if latents is not None:
            scenes = self._from_latents(latents, config, clips, progress=progress)
        else:
            drawn = [self._noise(noise, seed, clip.video) for clip in clips]
            hooks = {"callback": callback_on_step_end, "timed": timed, "progress": progress}
            scenes = self._sample(config, prompt, plan, clips, drawn, **hooks)
        source = waveform if isinstance(audio, np.ndarray) else media.audio_part(audio, config.start, used)
        return DubbedVideo(plan, scenes, source, seconds, background)

    def _sample(
        self,
        config: SampleConfig,
        prompt: str,
        plan: DubbingPlan,
        clips: Sequence["_Clip"],
        noise: Sequence[Float[Array, "1 _ h w C"]],
        *,
        timed: Timed,
        **options: Any,
    ) -> list[DubbedScene]:
        """Encodes all scenes, then samples each from its noise; `options` are those of `_generate`."""
        with self._on_mesh() as networks:
            conditions = self._encode_clips(networks.for_stage(), config, prompt, plan, clips, timed)
            sampling, scenes = networks.for_stage(), []
            for clip, drawn, (inputs, held) in zip(clips, noise, conditions, strict=True):
                decode, latents = self._generate(
                    sampling,
                    config,
                    inputs,
                    drawn,
                    clip.windows,
                    held=held,
                    strength=config.strength,
                    timed=timed,
                    **options,
                )
                scenes.append(DubbedScene(clip.speaker, clip.rates, decode, latents))
        return scenes

    def _from_latents(
        self,
        latents: Float[Array, "1 F h w C"],
        config: SampleConfig,
        clips: Sequence["_Clip"],
        *,
        progress: bool,
    ) -> list[DubbedScene]:
        """The scenes of latents that were sampled before."""
        channels = self.networks.config.vae.latent_channels
        shapes = [clip.video.latent_shape(1, channels) for clip in clips]
        counts = [shape[1] for shape in shapes]
        wanted = (1, sum(counts), *shapes[0][2:])  # the scenes have one size
        if latents.shape != wanted:
            raise ConfigError(
                f"latents have shape {list(latents.shape)}; the scenes need {list(wanted)}; "
                "give the video, audio, mask, people and config with which they were sampled"
            )
        parts = jnp.split(latents, np.cumsum(counts)[:-1], axis=1)
        decoders = [partial(self._decode, part, config, progress=progress) for part in parts]
        return [
            DubbedScene(clip.speaker, clip.rates, decode, part)
            for clip, decode, part in zip(clips, decoders, parts, strict=True)
        ]

    def _clips(
        self, config: SampleConfig, plan: DubbingPlan, waveform: Float[np.ndarray, " samples"]
    ) -> list["_Clip"]:
        """The scenes that are dubbed as the model takes them."""
        source_fps, side = plan.source.fps, self.video.longest_edge
        fps = float(source_fps) if source_fps <= MAX_FPS else float(self.video.fps)
        clips = []
        for speaker in plan.speakers:
            rates = match_rates(speaker.num_frames, float(source_fps), fps)
            video = replace(self.video.for_size(side, side), num_frames=len(rates.taken))
            start = round(float(speaker.first / source_fps) * SAMPLE_RATE)
            count = audio_samples(video.num_frames, fps)
            sound = waveform[start : start + count]
            windows = config.windows(video, self.video)
            if windows is not None:  # each window has the source's frame at its own start
                windows = replace(windows, references=tuple(windows.starts()))
            clips.append(_Clip(speaker, rates, np.pad(sound, (0, count - sound.size)), video, windows))
        return clips

    def _encode_clips(
        self,
        networks: Networks,
        config: SampleConfig,
        prompt: str,
        plan: DubbingPlan,
        clips: Sequence["_Clip"],
        timed: Timed,
    ) -> list[tuple[ClipInputs, HeldLatents]]:
        """What each scene is conditioned on, and what is kept of it; the source is read twice, by frames."""
        stills, source = SceneReader(plan.source), SceneReader(plan.source)
        return [
            self._encode_clip(
                networks,
                config,
                prompt,
                clip,
                stills.crops(clip.speaker, clip.video.height),
                source.crops(clip.speaker, clip.video.height),
                timed,
            )
            for clip in clips
        ]

    def _encode_clip(
        self,
        networks: Networks,
        config: SampleConfig,
        prompt: str,
        clip: "_Clip",
        stills: Iterator[Crop],
        source: Iterator[Crop],
        timed: Timed,
    ) -> tuple[ClipInputs, HeldLatents]:
        """What a scene is conditioned on, and what is kept of it.

        Args:
            networks: On the mesh.
            config: Settings of this call.
            prompt: What the video shows.
            clip: The scene.
            stills: The crop in every frame of the scene; single ones are kept, as pictures.
            source: The same once more, which is encoded.
            timed: Wraps each stage.
        """
        wanted = {clip.speaker.portrait, *clip.references}
        pictures = {i: Image.fromarray(crop) for i, crop in enumerate(stills) if i in wanted}
        portrait = pictures[clip.speaker.portrait]
        points = clip.speaker.points * (clip.video.height / clip.speaker.square.side)
        face = self._encode_face(networks, config, portrait, timed, points.astype(np.float32))

        def adapters() -> Mapping[str, Array]:
            with timed("Speech encoder"):
                return face | {"audio": encoders.encode_audio(networks["speech_encoder"], clip.waveform)}

        firsts = [pictures[index] for index in clip.references]
        inputs = self._encode(networks, config, firsts, prompt, clip.video, adapters, timed)
        with timed("Source to latents"):
            taken = at_indices(source, clip.rates.taken)
            latents = jnp.concatenate(list(encode_stream(networks["vae"], taken)), axis=1)
        free = latent_mask(generated_masks(clip.speaker, clip.rates), clip.video.height)
        return inputs, HeldLatents(latents, jnp.asarray(free[None, ..., None], jnp.float32))


@dataclass(frozen=True)
class _Clip:
    """A scene as the model takes it.

    Attributes:
        speaker: Crop and masks.
        rates: Which frames are generated.
        waveform: Its sound, of 16 kHz, padded with silence.
        video: Size and length of the clip.
        windows: Its windows, if it is longer than one.
    """

    speaker: Speaker
    rates: FrameRates
    waveform: Float[np.ndarray, " samples"]
    video: VideoConfig
    windows: WindowSchedule | None

    @property
    def references(self) -> list[int]:
        """Frames of the scene that windows are conditioned on, one for each of their references."""
        starts = (0,) if self.windows is None else self.windows.references
        return [int(self.rates.taken[video_frames(start + 1) - 1]) for start in starts]
