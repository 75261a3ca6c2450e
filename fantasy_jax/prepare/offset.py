"""The constant offset of a video's audio, measured over several clips before any of them is examined."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.media import AudioTrack
from fantasy_jax.prepare.analysis import Detectors, Dropped, PrepareTask
from fantasy_jax.prepare.cutting import Segment
from fantasy_jax.prepare.measures import chance, find_lag
from fantasy_jax.prepare.talking import TalkingClip
from fantasy_jax.preprocessing.landmarks import FaceTrack

_CLIPS, _SEGMENTS = 8, 16
"""Clips with a face that are measured, and segments in which they are searched."""
_CERTAIN = 3.0
"""Standard deviations of chance by which the correlation at an offset must exceed that in step."""


@dataclass(frozen=True)
class Offset:
    """What the first clips of a video tell.

    Attributes:
        frames: Frames by which the lips are late, which the audio is shifted by, to hundredths; 0 if it is in
            step, or if no offset is certain.
        faces: Tracked faces by the first frame of their segment, which need not be tracked again.
    """

    frames: float = 0.0
    faces: dict[int, Sequence[FaceTrack]] = field(default_factory=dict)


def find_offset(
    segments: Iterator[Segment], audio: AudioTrack, task: PrepareTask, detectors: Detectors
) -> Offset:
    """Measures the offset: the lag at which lips and audio correlate best on average over clips.

    Args:
        segments: Of the video, from its start; not all are read.
        audio: Audio of the video, 16 kHz.
        task: The settings.
        detectors: Detectors of faces and bodies.
    """
    found, faces = [], {}
    try:
        for _, segment in zip(range(_SEGMENTS), segments, strict=False):
            if segment.video is None or len(found) == _CLIPS:
                continue
            clip = TalkingClip(segment, audio, task, detectors)
            if (correlations := _correlations(clip)) is not None:
                found.append(correlations)
                faces[segment.first] = clip.faces
    except MediaError:  # it is reported when the video is cut
        pass
    if not found:
        return Offset()
    lag = find_lag(np.mean(found, axis=0), task.config.max_lag)
    deviation = chance(len(found) * task.video.num_frames)
    certain = lag.gain > _CERTAIN * deviation and lag.value + lag.gain >= task.config.min_sync
    return Offset(round(lag.peak, 2) if certain else 0.0, faces)


def _correlations(clip: TalkingClip) -> np.ndarray | None:
    """The clip's correlations by lag; None if it has no face or too little audio."""
    try:
        if clip.missing_seconds <= clip.task.config.max_missing_sound:
            return clip.lag_correlations()
    except (ConfigError, MediaError):
        raise
    except Dropped:
        pass
    except Exception:  # the clip is dropped for it when it is examined
        logging.getLogger(__name__).debug("%s", clip.segment.first, exc_info=True)
    return None
