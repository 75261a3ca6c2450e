"""The clips of one video, kept or dropped, as a function of the file's bytes and the settings only.

Local worker processes and workers of Apache Beam run the same function.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from fantasy_jax.data.records import Record
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.media import VideoInfo, probe_video, read_audio_track
from fantasy_jax.prepare.analysis import ClipAnalysis, Detectors, Dropped, PrepareTask, make_thumbnail
from fantasy_jax.prepare.config import ClipsConfig, PortraitPrepareConfig
from fantasy_jax.prepare.cutting import Segment, covering, cut
from fantasy_jax.prepare.filters import apply_filters
from fantasy_jax.prepare.offset import find_offset
from fantasy_jax.prepare.portrait import PortraitClip
from fantasy_jax.prepare.scan import SourceVideo
from fantasy_jax.prepare.talking import TalkingClip
from fantasy_jax.preprocessing.driving import open_detector
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeBodies, MediaPipeFaces
from fantasy_jax.typing import UInt8


@contextmanager
def open_detectors(config: ClipsConfig) -> Iterator[Detectors]:
    """Opens the configured detectors."""
    with ExitStack() as opened:
        if isinstance(config, PortraitPrepareConfig):
            yield Detectors(opened.enter_context(open_detector(config.driving)))
        else:
            faces = opened.enter_context(MediaPipeFaces(config.landmarks))
            yield Detectors(faces, opened.enter_context(MediaPipeBodies(config.landmarks)))


@dataclass(frozen=True)
class PreparedClip:
    """A clip, or a whole video, that was kept or dropped.

    Attributes:
        source: Name of the video.
        digest: Digest of the video.
        number: Number of the clip in the video, from 0; -1 for the whole video.
        seconds: Start and end in the video.
        dropped: Key of `filters.reasons_of`; empty if the clip is kept.
        message: Why it is dropped, or a note about a clip that is kept.
        measures: Values measured before the clip was dropped.
        thumbnail: A frame for the report.
        record: The raw clip record of a clip that is kept, without its prompt.
    """

    source: str
    digest: str
    number: int
    seconds: tuple[float, float]
    dropped: str
    message: str
    measures: dict[str, float] = field(default_factory=dict)
    thumbnail: UInt8[np.ndarray, "h w 3"] | None = None
    record: Record | None = None

    @classmethod
    def whole_video(cls, source: SourceVideo, dropped: str, message: str) -> "PreparedClip":
        """Makes the clip that stands for a dropped video."""
        return cls(source.name, source.digest, -1, (0.0, 0.0), dropped, message)

    def to_json(self) -> dict[str, Any]:
        """Returns all but thumbnail and record, for JSON."""
        return asdict(replace(self, thumbnail=None, record=None))

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> "PreparedClip":
        """Reads what `to_json` returned."""
        return cls(**described | {"seconds": tuple(described["seconds"])})

    @property
    def line(self) -> str:
        """One line for the log and the report."""
        place = "" if self.number < 0 else f", {self.seconds[0]:.1f} to {self.seconds[1]:.1f} s"
        return f"{self.source}{place}: {self.message}"


def prepare_video(source: SourceVideo, task: PrepareTask, detectors: Detectors) -> Iterator[PreparedClip]:
    """Yields every clip of a video in order.

    Errors of the file are not raised; they yield a dropped clip.
    """
    number = 0
    try:
        info = probe_video(source.path)
        size = _covering_size(info, task)
        segments = partial(
            cut,
            source.path,
            fps=task.video.fps,
            num_frames=task.video.num_frames,
            size=size,
            threshold=task.config.cut_threshold,
        )
        analysis = _analysis(source, info, segments, task, detectors)
        for segment in segments():
            seconds = tuple(
                index / task.video.fps for index in (segment.first, segment.first + segment.num_frames)
            )
            clip = PreparedClip(source.name, source.digest, number, seconds, "", "")
            yield _examine(clip, segment, partial(analysis, segment))
            number += 1
    except Dropped as dropped:
        yield PreparedClip.whole_video(source, dropped.reason, str(dropped))
    except MediaError as error:
        after = f" after {number} clips" if number else ""
        reason = str(error).removeprefix(f"{source.path}: ")
        yield PreparedClip.whole_video(source, "unreadable", f"unreadable{after}: {reason}")
    except ConfigError:
        raise
    except Exception as error:  # no file may end the run, whatever is wrong with it
        yield PreparedClip.whole_video(source, "error", _unexpected(source, error))


def _covering_size(info: VideoInfo, task: PrepareTask) -> tuple[int, int]:
    """Returns the size that frames are scaled to."""
    size = covering(info.height, info.width, task.video.size)
    enlargement = size[0] / info.height
    if enlargement > task.config.max_enlargement:
        raise Dropped(
            "small",
            f"{info.width} x {info.height} pixels would be upscaled {enlargement:.2f} times; "
            f"at most {task.config.max_enlargement:.2f} times is allowed",
        )
    return size


def _analysis(
    source: SourceVideo,
    info: VideoInfo,
    segments: Callable[[], Iterator[Segment]],
    task: PrepareTask,
    detectors: Detectors,
) -> Callable[[Segment], ClipAnalysis]:
    """Returns what begins the examination of a segment; of videos with speech, the audio is read before."""
    if isinstance(task.config, PortraitPrepareConfig):
        return partial(PortraitClip, task=task, detectors=detectors)
    if not info.has_audio:
        raise Dropped("no_sound", "has no audio")
    audio = read_audio_track(source.path)
    offset = find_offset(segments(), audio, task, detectors)

    def begin(segment: Segment) -> TalkingClip:
        faces = offset.faces.pop(segment.first, None)
        return TalkingClip(segment, audio, task, detectors, offset.frames, faces)

    return begin


def _examine(clip: PreparedClip, segment: Segment, make: Callable[[], ClipAnalysis]) -> PreparedClip:
    """Applies the filters to a clip, and makes its record if it passes all of them."""
    analysis = None
    try:
        analysis = make()
        apply_filters(analysis)
        record = analysis.record()
        return replace(
            clip,
            message=analysis.note,
            measures=analysis.measures,
            thumbnail=analysis.thumbnail(),
            record=record,
        )
    except Dropped as dropped:
        reason, message = dropped.reason, str(dropped)
    except ConfigError:
        raise
    except Exception as error:  # no clip may end the run either
        reason, message = "error", _unexpected(clip, error)
    thumbnail = None if segment.video is None else make_thumbnail(segment.video[len(segment.video) // 2])
    return replace(
        clip,
        dropped=reason,
        message=message,
        measures=analysis.measures if analysis else {},
        thumbnail=thumbnail,
    )


def _unexpected(where: SourceVideo | PreparedClip, error: Exception) -> str:
    logging.getLogger(__name__).debug("%s", where, exc_info=True)
    return f"{type(error).__name__}: {error}".splitlines()[0]
