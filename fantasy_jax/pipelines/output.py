"""What a pipeline returns: a clip whose frames are decoded while they are iterated or written."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from fantasy_jax import media
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import PIXELS_PER_LATENT, SAMPLE_RATE


@dataclass(frozen=True)
class VideoOutput:
    """A generated clip, whose frames are decoded when they are needed.

    Attributes:
        decode: Starts to decode the latents, and yields frames: RGB, uint8 `[H, W, 3]`.
        latents: Final latents, float32, `[1, F, h, w, C]`.
        num_frames: Frames T of the video; the latents can hold a few more.
        fps: Frames per second.
        audio: The audio file, a part of one, or the waveform in [-1, 1]; None for a silent clip.
        audio_seconds: Duration of the audio.
        audio_rate: Sampling rate of the waveform, in Hz.
    """

    decode: Callable[[], Iterator[UInt8[np.ndarray, "H W 3"]]]
    latents: Float[Array, "1 F h w C"]
    num_frames: int
    fps: int
    audio: str | Path | media.AudioPart | np.ndarray | None = None
    audio_seconds: float = 0.0
    audio_rate: int = SAMPLE_RATE

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.latents.shape[2] * PIXELS_PER_LATENT

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.latents.shape[3] * PIXELS_PER_LATENT

    @property
    def seconds(self) -> float:
        """Duration of the video."""
        return self.num_frames / self.fps

    @cached_property
    def frames(self) -> UInt8[np.ndarray, "T H W 3"]:
        """All frames, which are decoded once and kept."""
        return np.stack(list(islice(self.decode(), self.num_frames)))

    def stream_frames(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the frames one by one; they are decoded, but not kept, unless `frames` has been used."""
        return iter(self.frames) if "frames" in vars(self) else islice(self.decode(), self.num_frames)

    def save(self, path: str | Path, *, sheet: str | Path | None = None) -> None:
        """Writes an mp4 with the audio, cut to the video's length.

        Frames are written while they are decoded, so that memory does not grow with the length.

        Args:
            path: The mp4.
            sheet: A PNG with frames of the clip; None: it is not written.

        Raises:
            MediaError: A file cannot be written, or the audio cannot be read.
        """
        collected = media.ContactSheet(self.num_frames, self.fps)
        frames = collected.collect(self.stream_frames())
        with audio_file(self.audio, self.audio_rate) as audio:
            media.write_video(path, frames, self.fps, audio=audio)
        if sheet is not None:
            collected.write(sheet)


@contextmanager
def audio_file(
    audio: str | Path | media.AudioPart | np.ndarray | None, rate: int
) -> Iterator[str | Path | media.AudioPart | None]:
    """The file of a sound: its own or, for a waveform in [-1, 1] of `rate` Hz, a temporary WAV file."""
    if not isinstance(audio, np.ndarray):
        yield audio
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audio.wav"
        media.write_audio(path, np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16), rate)
        yield path
