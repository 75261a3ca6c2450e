"""A dubbed video: generated crops are decoded and pasted while its frames are iterated."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fantasy_jax import media
from fantasy_jax.errors import MediaError
from fantasy_jax.pipelines.dubbing_plan import DubbingPlan
from fantasy_jax.pipelines.output import audio_file
from fantasy_jax.preprocessing.dubbing import FrameRates, Speaker, at_indices
from fantasy_jax.preprocessing.face_masks import opacity, paste
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import SAMPLE_RATE


@dataclass(frozen=True)
class DubbedScene:
    """A scene after dubbing.

    Attributes:
        speaker: Crop and masks.
        rates: Which generated frame each frame of the source shows.
        decode: Starts to decode the latents, and yields the generated crop frame by frame, RGB.
        latents: Final latents.
    """

    speaker: Speaker
    rates: FrameRates
    decode: Callable[[], Iterator[UInt8[np.ndarray, "S S 3"]]]
    latents: Float[Array, "1 F h w C"]

    def shown(self) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """The generated crop that each frame of the source shows."""
        return at_indices(self.decode(), self.rates.shown)

    def paste(
        self, frame: UInt8[np.ndarray, "H W 3"], crop: UInt8[np.ndarray, "S S 3"], index: int
    ) -> UInt8[np.ndarray, "H W 3"]:
        """A frame of the source with a generated crop; `index` counts from the scene's first frame."""
        mask = self.speaker.mask(index)
        return paste(frame, crop, self.speaker.square, opacity(mask)) if mask.any() else frame


@dataclass(frozen=True)
class DubbedVideo:
    """A dubbed video. Each pass over its frames reads the source and decodes the latents.

    Attributes:
        plan: The source, and what of it is dubbed.
        scenes: The generated crops, in the order of the source.
        audio: The new audio: a file, a part of one, or a waveform of 16 kHz, in [-1, 1].
        audio_seconds: Its duration.
        background: File that is mixed with the audio.
    """

    plan: DubbingPlan
    scenes: Sequence[DubbedScene]
    audio: str | Path | media.AudioPart | np.ndarray
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

    @property
    def latents(self) -> Float[Array, "1 F h w C"]:
        """Final latents of all scenes, one after another."""
        return jnp.concatenate([scene.latents for scene in self.scenes], axis=1)

    def frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the frames, RGB; one is held at a time.

        Raises:
            MediaError: The source is not what it was.
        """
        return (dubbed for _, dubbed in self._pairs())

    def _pairs(self) -> Iterator[tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W 3"]]]:
        """Yields each frame of the source, and what becomes of it."""
        frames = iter(self.plan.source)
        done = 0
        for scene in self.scenes:
            first, count = scene.speaker.first, scene.speaker.num_frames
            yield from ((frame, frame) for frame in islice(frames, first - done))
            index = -1
            for index, (crop, frame) in enumerate(zip(scene.shown(), islice(frames, count), strict=False)):
                yield frame, scene.paste(frame, crop, index)
            if index < count - 1:
                raise MediaError(f"{self.plan.source.path}: the file changed while it was read; try again")
            done = first + count
        yield from ((frame, frame) for frame in frames)

    def save(self, path: str | Path, *, sheet: str | Path | None = None, lossless: bool = False) -> None:
        """Writes an mp4 with the new audio, cut to the video's length or padded with silence.

        Args:
            path: Output file.
            sheet: A PNG of evenly spaced frames: the source's, and below each the dubbed one; None: it is not
                written.
            lossless: Keeps every pixel (`media.write_video`).

        Raises:
            MediaError: A file cannot be written, a sound cannot be read, or the source is not what it was.
        """
        collected = media.ContactSheet(self.plan.num_frames, self.fps)
        stacked = collected.collect(np.concatenate(pair) for pair in self._pairs())
        frames = (pair[len(pair) // 2 :] for pair in stacked)
        with audio_file(self.audio, SAMPLE_RATE) as audio:
            media.write_video(
                path, frames, self.fps, audio=audio, background=self.background, lossless=lossless
            )
        if sheet is not None:
            collected.write(sheet)
