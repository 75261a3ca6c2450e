"""Dubbing: the speaker of a video says something else, and the rest of the video stays as it is.

The latents of the source are kept outside a mask of the lower face, at each step's noise level; the result is
pasted into the source with a soft edge.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from PIL import Image

from fantasy_jax import media
from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.errors import MediaError
from fantasy_jax.pipelines.base import (
    AudioInput,
    NoiseInput,
    StepProgress,
    Timed,
    as_waveform,
    audio_file,
    untimed,
)
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.dubbing_plan import DubbingPlan, plan_dubbing
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.preprocessing.dubbing import FrameRates, Speaker, generated_masks, match_rates
from fantasy_jax.preprocessing.face_masks import MaskMode, latent_mask, opacity, paste, resize_crop
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.system import encoders
from fantasy_jax.system.inputs import ClipInputs, first_frame_condition
from fantasy_jax.system.networks import Networks
from fantasy_jax.system.streaming import encode_stream
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import SAMPLE_RATE, VideoConfig, audio_samples, video_frames

MAX_FPS = 24
"""Largest frame rate of a source at which the model runs; the released weights are trained at 23."""


@dataclass(frozen=True)
class DubbedScene:
    """A scene after dubbing.

    Attributes:
        speaker: Crop and masks.
        rates: Which generated frame each frame of the source shows.
        frames: The crop, generated.
        latents: Final latents.
    """

    speaker: Speaker
    rates: FrameRates
    frames: UInt8[np.ndarray, "T S S 3"]
    latents: Float[Array, "1 F h w C"]

    def paste(self, frame: UInt8[np.ndarray, "H W 3"], index: int) -> UInt8[np.ndarray, "H W 3"]:
        """A frame of the source with the generated face; `index` counts from the scene's first frame."""
        mask = self.speaker.mask(index)
        if not mask.any():
            return frame
        return paste(frame, self.frames[self.rates.shown[index]], self.speaker.square, opacity(mask))


@dataclass(frozen=True)
class DubbedVideo:
    """A dubbed video, whose frames are composed while they are iterated.

    Attributes:
        plan: The source, and what of it is dubbed.
        scenes: The generated crops.
        audio: The new audio: a file, or a waveform of 16 kHz, in [-1, 1].
        audio_seconds: Its duration.
        background: File that is mixed with the audio.
    """

    plan: DubbingPlan
    scenes: Sequence[DubbedScene]
    audio: str | Path | np.ndarray
    audio_seconds: float
    background: str | Path | None = None

    @property
    def fps(self) -> Fraction:
        """Frames per second, the source's."""
        return self.plan.source.fps

    @property
    def seconds(self) -> float:
        """Duration of the video."""
        return float(self.plan.num_frames / self.fps)

    def frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the frames, RGB; the source is read again."""
        places = {
            scene.speaker.first + index: (scene, index)
            for scene in self.scenes
            for index in range(scene.speaker.num_frames)
        }
        for number, frame in enumerate(self.plan.source):
            scene, index = places.get(number, (None, 0))
            yield frame if scene is None else scene.paste(frame, index)

    def save(self, path: str | Path, *, lossless: bool = False) -> None:
        """Writes an mp4 with the new audio, cut to the video's length or padded with silence.

        Args:
            path: Output file.
            lossless: Keeps every pixel (`media.write_video`).

        Raises:
            MediaError: The file cannot be written, or a sound cannot be read.
        """
        with audio_file(self.audio, SAMPLE_RATE) as audio:
            media.write_video(
                path, self.frames(), self.fps, audio=audio, background=self.background, lossless=lossless
            )

    def save_sheet(self, path: str | Path) -> None:
        """Writes a PNG of evenly spaced frames: the source's, and below each the dubbed one.

        Raises:
            MediaError: The folder is not writable.
        """
        sheet = media.ContactSheet(self.plan.num_frames, self.fps)
        pairs = zip(self.plan.source, self.frames(), strict=True)
        for _ in sheet.collect(np.concatenate(pair) for pair in pairs):
            pass
        sheet.write(path)


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
            callback_on_step_end: Called after each sampling step.
            timed: Called with the name of each stage; the stage runs inside the context that it returns.
            progress: Whether to show progress bars.
            report: Called with each note of the plan before sampling.

        Raises:
            ConfigError: A setting is out of range or does not fit the video, or the face detector is missing.
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
            waveform = as_waveform(audio, sampling_rate)
            for sound in (audio, background):
                if isinstance(sound, str | Path):
                    media.check_audio(sound)
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
        scenes = []
        with self._on_mesh() as networks:
            for clip in self._clips(plan, waveform):
                windows = config.windows(clip.video, self.video)
                if windows is not None:  # each window has the source's frame at its own start
                    windows = replace(windows, references=tuple(windows.starts()))
                starts = (0,) if windows is None else windows.references
                inputs, held = self._encode_clip(networks, config, prompt, clip, starts, timed)
                decode, latents = self._generate(
                    networks,
                    config,
                    inputs,
                    self._noise(noise, seed, clip.video),
                    windows,
                    held=held,
                    strength=config.strength,
                    callback=callback_on_step_end,
                    timed=timed,
                    progress=progress,
                )
                frames = np.stack(list(decode()))
                scenes.append(DubbedScene(clip.speaker, clip.rates, frames, latents))
        source = waveform if isinstance(audio, np.ndarray) else audio
        return DubbedVideo(plan, scenes, source, seconds, background)

    def _clips(self, plan: DubbingPlan, waveform: Float[np.ndarray, " samples"]) -> Iterator["_Clip"]:
        """Yields the scenes that are dubbed as the model takes them; the source is read once."""
        source_fps, side = plan.source.fps, self.video.longest_edge
        fps = float(source_fps) if source_fps <= MAX_FPS else float(self.video.fps)
        frames = iter(plan.source)
        place = 0
        for speaker in plan.speakers:
            end = speaker.first + speaker.num_frames
            scene = islice(frames, speaker.first - place, end - place)
            crops = [resize_crop(speaker.square.cut(frame), side) for frame in scene]
            if len(crops) < speaker.num_frames:
                raise MediaError(f"{plan.source.path}: the file changed while it was read; try again")
            crops, place = np.stack(crops), end
            rates = match_rates(len(crops), float(source_fps), fps)
            video = replace(self.video.for_size(side, side), num_frames=len(rates.taken))
            start = round(float(speaker.first / source_fps) * SAMPLE_RATE)
            count = audio_samples(video.num_frames, fps)
            sound = waveform[start : start + count]
            yield _Clip(speaker, rates, crops, np.pad(sound, (0, count - sound.size)), video)

    def _encode_clip(
        self,
        networks: Networks,
        config: SampleConfig,
        prompt: str,
        clip: "_Clip",
        starts: Sequence[int],
        timed: Timed,
    ) -> tuple[ClipInputs, HeldLatents]:
        """What a scene is conditioned on, with pictures at some latent frames, and what is kept of it."""
        frames = clip.crops[clip.rates.taken]
        scale = len(frames[0]) / clip.speaker.square.side
        portrait = Image.fromarray(clip.crops[clip.speaker.portrait])
        face = self._encode_face(
            networks, config, portrait, timed, (clip.speaker.points * scale).astype(np.float32)
        )

        def adapters() -> Mapping[str, Array]:
            with timed("Speech encoder"):
                return face | {"audio": encoders.encode_audio(networks["speech_encoder"], clip.waveform)}

        first, *later = [frames[video_frames(start + 1) - 1] for start in starts]
        inputs = self._encode(networks, config, Image.fromarray(first), prompt, clip.video, adapters, timed)
        inputs = _with_references(networks, inputs, later, video_frames(inputs.first_frame.shape[1]))
        with timed("Source to latents"):
            latents = jnp.concatenate(list(encode_stream(networks["vae"], frames)), axis=1)
        free = latent_mask(generated_masks(clip.speaker, clip.rates), clip.video.height)
        return inputs, HeldLatents(latents, jnp.asarray(free[None, ..., None], jnp.float32))


@dataclass(frozen=True)
class _Clip:
    """A scene as the model takes it.

    Attributes:
        speaker: Crop and masks.
        rates: Which frames are generated.
        crops: The crop in every frame of the source, in the size that is generated.
        waveform: Its sound, of 16 kHz, padded with silence.
        video: Size and length of the clip.
    """

    speaker: Speaker
    rates: FrameRates
    crops: UInt8[np.ndarray, "N S S 3"]
    waveform: Float[np.ndarray, " samples"]
    video: VideoConfig


def _with_references(
    networks: Networks, inputs: ClipInputs, frames: Sequence[UInt8[np.ndarray, "S S 3"]], num_frames: int
) -> ClipInputs:
    """Adds the first frames of later windows: a row of first-frame condition and image tokens for each."""
    if not frames:
        return inputs
    pixels = from_uint8(np.stack(frames))
    image = jnp.concatenate([encoders.encode_image(networks, x) for x in pixels])
    latents = encoders.encode_first_frame(networks["vae"], pixels, num_frames)
    text, negative_text = (x.repeat(len(pixels) + 1, axis=0) for x in (inputs.text, inputs.negative_text))
    return replace(
        inputs,
        first_frame=jnp.concatenate([inputs.first_frame, first_frame_condition(latents)]),
        text=text,
        negative_text=negative_text,
        image=jnp.concatenate([inputs.image, image]),
    )
