"""Speech to video while it is spoken: blocks of windows, each of which goes on from the one before.

Memory does not grow with the length. The last latents of a block are not shown before the next block has
cross-faded into them: it holds them at each step's noise level, less and less from the first to the last.
Latents are carried as they are, never decoded and encoded again, and the decoder's causal cache goes on, too.
Every window is conditioned on the picture, as in `diffusion/windows.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.diffusion.magcache import Calibration
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.diffusion.windows import WindowSchedule
from fantasy_jax.errors import MediaError
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.latents import initial_noise
from fantasy_jax.sharding import replicate
from fantasy_jax.system import encoders
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.networks import Networks
from fantasy_jax.system.streaming import StreamingDecoder
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import (
    FEATURE_HOP,
    SAMPLE_RATE,
    TEMPORAL_FACTOR,
    VideoConfig,
    audio_samples,
    video_frames,
    wav2vec2_length,
)

_CONTEXT = encoders.AUDIO_CONTEXT * FEATURE_HOP
"""Samples before a block that the speech encoder is given as context."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks, in latent frames.

    Attributes:
        video: Geometry of a window.
        config: Settings of sampling.
        windows: Windows of a block.
    """

    video: VideoConfig
    config: SampleConfig
    windows: int = 1

    @property
    def schedule(self) -> WindowSchedule:
        """The windows of the first block."""
        window, config = self.video.latent_frames, self.config
        single = WindowSchedule(window, window, config.overlap, config.anchor, config.moving)
        more = (self.windows - 1) * (single.useful - single.overlap)
        return replace(single, num_frames=window + more)

    @property
    def held(self) -> int:
        """Latent frames that a later block takes over: one before its first window, and the overlap."""
        return 1 + self.config.overlap

    @property
    def new(self) -> int:
        """Latent frames that a later block adds."""
        return self.schedule.num_frames - self.held

    def samples(self, index: int) -> tuple[int, int]:
        """The samples of the stream, of 16 kHz, that a block spans: first, and one after the last."""
        # The first latent frame of a later block is one that is held, of which the last video frame counts.
        first = TEMPORAL_FACTOR * index * self.new
        start = round(first / self.video.fps * SAMPLE_RATE / FEATURE_HOP) * FEATURE_HOP
        return start, start + audio_samples(video_frames(self.schedule.num_frames), self.video.fps)

    @property
    def latency(self) -> float:
        """Seconds of sound that a block waits for after the first one."""
        return self.new * TEMPORAL_FACTOR / self.video.fps


class VideoStream:
    """The frames of a stream of speech, block by block.

    Attributes:
        fps: Frames per second.
        first_latency: Seconds of sound after which the first frames come, and the time to sample them.
        latency: Seconds of sound from one block to the next.
    """

    def __init__(
        self,
        networks: Networks,
        inputs: ClipInputs,
        blocks: Blocks,
        chunks: Iterable[Float[np.ndarray, " _"]],
        seed: int,
        calibration: Calibration | None = None,
    ):
        """Prepares a stream.

        Args:
            networks: On the mesh.
            inputs: The conditions of a window without its audio.
            blocks: Sizes of the blocks.
            chunks: Speech at 16 kHz, in [-1, 1], in pieces of any length.
            seed: Seed of the noise.
            calibration: Measures MagCache's curve on every block; None: not measured.
        """
        self.fps = blocks.video.fps
        self.first_latency, self.latency = blocks.video.seconds, blocks.latency
        self._networks, self._inputs, self._blocks = networks, inputs, blocks
        self._chunks, self._seed, self._calibration = chunks, seed, calibration

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
        """Yields the frames of each block, as soon as its sound is there.

        The last block is filled with silence, and its frames end with the sound.

        Raises:
            MediaError: There is no sound.
        """
        config, carried = self._blocks.config, None
        decoder = StreamingDecoder(self._networks["vae"], **config.decoding)
        shown = 0
        for index, audio in enumerate(self._block_audio()):
            latents = self._sample(index, audio, carried)
            carried = latents[:, -self._blocks.held :]
            unfinished = 0 if audio.ends is not None else config.overlap
            final = latents[:, 1 if index else 0 : latents.shape[1] - unfinished]
            frames = np.concatenate(list(decoder(final)))
            if audio.ends is not None:
                frames = frames[: max(round(audio.ends / SAMPLE_RATE * self.fps) - shown, 0)]
            shown += len(frames)
            if len(frames):
                yield frames
        if not shown:
            raise MediaError("audio: the stream ended without a sample")

    def _sample(self, index: int, audio: "_BlockAudio", carried: Array | None) -> Float[Array, "1 F h w C"]:
        """The latents of a block, with those that it holds."""
        networks, config, held = self._networks, self._blocks.config, None
        schedule = replace(self._blocks.schedule, continues=index > 0)
        channels = networks.config.vae.latent_channels
        video = replace(self._blocks.video, num_frames=video_frames(schedule.num_frames))
        noise = initial_noise(self._seed, video.latent_shape(1, channels), block=index)
        features = audio.encode(networks["speech_encoder"])
        inputs = replace(self._inputs, adapters=self._inputs.adapters | {"audio": features})
        if carried is not None:
            known = jnp.pad(carried, [(0, 0), (0, self._blocks.new), (0, 0), (0, 0), (0, 0)])
            mask = jnp.clip(jnp.arange(schedule.num_frames) / self._blocks.held, 0, 1)
            held = HeldLatents(known, mask.reshape(1, -1, 1, 1, 1))
        return sample(
            networks["transformer"],
            *replicate((noise, inputs)),
            config,
            guidance=config.guidance,
            options=config.adapter_options,
            windows=schedule if schedule.count > 1 or index else None,
            held=replicate(held),
            residual_callback=self._calibration,
        )

    def _block_audio(self) -> Iterator["_BlockAudio"]:
        """Yields the sound of each block, as soon as there is enough; no more is kept than is needed."""
        buffer, offset, index = np.zeros(0, np.float32), 0, 0
        total = squares = 0.0
        count, ended, chunks = 0, False, iter(self._chunks)
        while True:
            start, end = self._blocks.samples(index)
            while offset + buffer.size < end and not ended:
                chunk = next(chunks, None)
                ended = chunk is None
                if chunk is not None:
                    buffer = np.concatenate([buffer, chunk.astype(np.float32)])
                    total += chunk.sum(dtype=float)
                    squares += np.square(chunk).sum(dtype=float)
                    count += chunk.size
            if not count:
                return
            as_is = not self._networks.config.speech_encoder.do_normalize
            mean = 0.0 if as_is else total / count
            first = max(start - _CONTEXT, 0)
            scale = 1.0 if as_is else np.sqrt(max(squares / count - mean**2, 0) + 1e-7)
            waveform = (buffer[first - offset : end - offset] - mean) / scale
            waveform = np.pad(waveform, (0, end - first - waveform.size)).astype(np.float32)
            done = ended and offset + buffer.size <= end
            yield _BlockAudio(waveform, start - first, offset + buffer.size if done else None)
            if done:
                return
            index += 1
            kept = max(self._blocks.samples(index)[0] - _CONTEXT - offset, 0)
            buffer, offset = buffer[kept:], offset + kept


@dataclass(frozen=True)
class _BlockAudio:
    """The sound of a block.

    Attributes:
        waveform: With the context before it, normalised by all samples so far.
        context: Samples of the context.
        ends: Samples of the whole stream, if it ends in this block.
    """

    waveform: Float[np.ndarray, " samples"]
    context: int
    ends: int | None

    def encode(self, encoder: Wav2Vec2Model) -> Float[Array, "1 A C"]:
        """Speech features of the block, without those of the context."""
        count = wav2vec2_length(self.waveform.size - self.context)
        first = self.context // FEATURE_HOP
        return encoders.encode_normalised(encoder, self.waveform)[:, first : first + count]
