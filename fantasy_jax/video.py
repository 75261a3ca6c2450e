"""The geometry of a clip: size, number of frames, frame rate, and all that follows from them.

Wan2.1's VAE encodes the first frame alone and every four frames after it together, so that `4k + 1` video
frames become `k + 1` latent frames; in space a latent stands for 8 x 8 pixels, and a token of the transformer
for 2 x 2 latents.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, TypeVar

from fantasy_jax.config import Range, Settings
from fantasy_jax.errors import ConfigError

Frame = TypeVar("Frame")

TEMPORAL_FACTOR = 4
"""Video frames of a latent frame, except the first, which is one video frame."""
PIXELS_PER_LATENT = 8
"""Pixels of a latent along each side."""
PIXELS_PER_TOKEN = 16
"""Pixels of one of the transformer's tokens along each side."""
SAMPLE_RATE = 16_000
"""Sampling rate of every waveform that a network takes, in Hz."""
FEATURE_WINDOW, FEATURE_HOP = 400, 320
"""Samples of one wav2vec2 feature, and from one feature to the next: 25 ms every 20 ms."""


def latent_frames(num_frames: int) -> int:
    """Latent frames F of `num_frames` video frames."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1


def by_latent_frame(frames: Iterable[Frame]) -> Iterator[list[Frame]]:
    """Groups frames, or what there is of each, by latent frame: the first one alone, then four each."""
    remaining, count = iter(frames), 1
    while group := list(islice(remaining, count)):
        yield group
        count = TEMPORAL_FACTOR


def video_frames(num_latent_frames: int) -> int:
    """Video frames T of `num_latent_frames` latent frames."""
    return TEMPORAL_FACTOR * (num_latent_frames - 1) + 1


def audio_samples(num_frames: int, fps: int | float) -> int:
    """Audio samples that `num_frames` video frames last."""
    return int(num_frames / fps * SAMPLE_RATE)


def wav2vec2_length(num_samples: int) -> int:
    """Features that wav2vec2 makes of a waveform of 16 kHz, for any of its released sizes."""
    return max(num_samples - FEATURE_WINDOW, -FEATURE_HOP) // FEATURE_HOP + 1


def check_num_frames(num_frames: int) -> None:
    """Raises a ConfigError unless `num_frames` is 4k + 1 and at least 5."""
    if num_frames < TEMPORAL_FACTOR + 1 or num_frames != video_frames(latent_frames(num_frames)):
        raise ConfigError(f"num_frames is {num_frames}; it must be 4k + 1 and at least 5")


@dataclass(frozen=True)
class VideoConfig(Settings):
    """Size, length and frame rate of clips; the defaults are those of FantasyTalking's official script.

    Attributes:
        height: In pixels, a multiple of 16. When sampling, the image's aspect ratio is kept and the larger of
            height and width bounds its longest edge.
        width: In pixels, likewise.
        num_frames: Frames T of a clip, 4k + 1. When sampling, those of a window; shorter audio gives a
            shorter clip, and longer audio a clip of several windows.
        fps: Frames per second.
    """

    height: Annotated[int, Range(16, 8192)] = 512
    width: Annotated[int, Range(16, 8192)] = 512
    num_frames: Annotated[int, Range(5, 2**24 + 1)] = 81
    fps: Annotated[int, Range(1, 1000)] = 23

    def __post_init__(self):
        super().__post_init__()
        for name in ("height", "width"):
            if getattr(self, name) % PIXELS_PER_TOKEN:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of {PIXELS_PER_TOKEN}"
                )
        check_num_frames(self.num_frames)

    @property
    def longest_edge(self) -> int:
        """The larger of height and width, in pixels."""
        return max(self.height, self.width)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def latent_frames(self) -> int:
        """Latent frames F."""
        return latent_frames(self.num_frames)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latents."""
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    @property
    def tokens_per_frame(self) -> int:
        """Video tokens S of a latent frame."""
        return (self.height // PIXELS_PER_TOKEN) * (self.width // PIXELS_PER_TOKEN)

    @property
    def num_samples(self) -> int:
        """Audio samples of a clip, at 16 kHz."""
        return audio_samples(self.num_frames, self.fps)

    @property
    def audio_tokens(self) -> int:
        """wav2vec2 features A of a clip."""
        return wav2vec2_length(self.num_samples)

    @property
    def seconds(self) -> float:
        """Duration of a clip."""
        return self.num_frames / self.fps

    def latent_shape(self, batch_size: int, channels: int) -> tuple[int, int, int, int, int]:
        """Shape `[B, F, h, w, C]` of the latents of a batch."""
        return batch_size, self.latent_frames, *self.latent_size, channels

    def for_size(self, height: int, width: int) -> "VideoConfig":
        """The same clips in another size."""
        return replace(self, height=height, width=width)

    def for_seconds(self, seconds: float) -> "VideoConfig":
        """Clips for audio of this duration.

        Where T frames suffice, the clip has `min(floor(fps * seconds / 4) * 4 + 5, T)` frames
        (fantasy-talking, `infer.py`); otherwise as few as last as long as the audio.
        """
        frames = math.ceil(self.fps * seconds - 1e-6)
        if frames > self.num_frames:
            return replace(self, num_frames=video_frames(-(-(frames - 1) // TEMPORAL_FACTOR) + 1))
        groups = int(self.fps * seconds // TEMPORAL_FACTOR)
        return replace(self, num_frames=min(video_frames(groups + 2), self.num_frames))
