"""What of a video is dubbed: its scenes with a speaker, as far as the audio lasts."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from fantasy_jax import media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.preprocessing.boxes import place_boxes
from fantasy_jax.preprocessing.dubbing import (
    MIN_FRAMES,
    Speaker,
    VideoScene,
    check_mask,
    choose_face,
    find_scenes,
    still_speaker,
    track_speaker,
)
from fantasy_jax.preprocessing.face_masks import MASK_MODES, MaskMode, resize_crop
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeFaces
from fantasy_jax.typing import Float, UInt8

_EPSILON = 1e-6
"""Tolerance for rounding when durations are compared, in frames."""


@dataclass(frozen=True)
class SourceVideo:
    """The frames of a video at its own rate, which can be iterated repeatedly; each pass reads the file.

    Attributes:
        path: The file.
        fps: Frames per second.
        height: In pixels.
        width: In pixels.
    """

    path: str | Path
    fps: Fraction
    height: int
    width: int

    @classmethod
    def open(cls, path: str | Path) -> "SourceVideo":
        """Reads the properties of a file.

        Raises:
            MediaError: The file is missing or is not a readable video.
        """
        info = media.probe_video(path)
        return cls(path, info.fps, info.height, info.width)

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the frames, RGB, upright."""
        return (frame for _, frame in media.stream_video(self.path, float(self.fps)))


class SceneReader:
    """Reads the crops of one scene after another, in one pass over the source."""

    def __init__(self, source: SourceVideo):
        """Starts at the first frame of a source."""
        self._source, self._frames, self._read = source, iter(source), 0

    def crops(self, speaker: Speaker, side: int) -> Iterator[UInt8[np.ndarray, "{side} {side} 3"]]:
        """Yields the crop in each frame of a scene, which lies behind what was read before.

        Args:
            speaker: Where the crop is.
            side: Rows and columns to which it is resized.

        Raises:
            MediaError: The video ends before the scene does.
        """
        for index in range(self._read, speaker.first + speaker.num_frames):
            frame = next(self._frames, None)
            if frame is None:
                raise MediaError(f"{self._source.path}: the file changed while it was read; try again")
            self._read += 1
            if index >= speaker.first:
                yield resize_crop(speaker.square.cut(frame), side)


@dataclass(frozen=True)
class DubbingPlan:
    """What of a video is dubbed.

    Attributes:
        source: The video.
        num_frames: Number of its frames.
        speakers: The speaker of each scene that is dubbed, in the order of the scenes.
        notes: What the user should know: what is left as it is, and why.
    """

    source: SourceVideo
    num_frames: int
    speakers: Sequence[Speaker]
    notes: tuple[str, ...]


def plan_dubbing(
    path: str | Path,
    seconds: float,
    *,
    mask: MaskMode,
    config: LandmarkConfig,
    people: Sequence[int] = (),
    boxes: Sequence[Float[np.ndarray, "4"]] = (),
    progress: bool = False,
) -> DubbingPlan:
    """Cuts a video into scenes, tracks faces, and chooses the speaker of each scene.

    Args:
        path: The video.
        seconds: Duration of the audio; what comes after it is left as it is.
        mask: What is generated.
        config: Settings of the face detector.
        people: Number of the speaker among the people of a scene, from 1, from left to right, for all scenes,
            or one for each; 0 leaves a scene as it is.
        boxes: The speaker's head instead, left, top, right, bottom as fractions of the frame, for all scenes,
            or one for each. Where no face is found in it, the head is taken to stay in the box.
        progress: Whether to show progress bars.

    Raises:
        ConfigError: A setting does not fit the video, or a package or model of detection is missing.
        MediaError: The video cannot be read, has one frame, shows no face or several people of whom none is
            chosen, has a scene that is too short, or has nothing to dub before the audio ends.
    """
    if mask not in MASK_MODES:
        raise ConfigError(f"--mask={mask}: must be one of {', '.join(MASK_MODES)}")
    if people and len(boxes):
        raise ConfigError("--person and --box both say who speaks; give one of them")
    source = SourceVideo.open(path)
    wanted = math.ceil(seconds * source.fps - _EPSILON)
    stream = iter(source)
    with open_detector(config) as detector:
        analysed = islice(stream, wanted)
        scenes = find_scenes(analysed, float(source.fps), detector, config, progress=progress)
    covered = sum(scene.num_frames for scene in scenes)
    num_frames = covered + sum(1 for _ in stream)
    if num_frames < 2:
        raise MediaError(f"{path}: has one frame; use sample.py --image for a picture")
    placed = place_each(boxes, source, len(scenes))
    chosen = _repeated(people, len(scenes), "--person") if people else [None] * len(scenes)
    notes = _duration_notes(source, num_frames, seconds)
    cut_off = num_frames > covered
    speakers = []
    for number, (scene, person, box) in enumerate(zip(scenes, chosen, placed, strict=True), 1):
        ends_early = cut_off and number == len(scenes)
        speaker = _speaker(source, scene, mask, person, box, ends_early=ends_early)
        if speaker is None:
            notes.append(f"{path}: {scene} are left as they are: {_reason(scene, person)}")
        else:
            speakers.append(speaker)
            notes += _untracked_frames(source, scene, speaker)
    if not speakers:
        raise _nothing_to_dub(source, scenes, num_frames, seconds)
    return DubbingPlan(source, num_frames, speakers, tuple(notes))


open_detector = MediaPipeFaces
"""Opens the face detector, to be used in a `with` statement."""


def place_each(
    boxes: Sequence[Float[np.ndarray, "4"]], source: SourceVideo, count: int
) -> list[Float[np.ndarray, "4"] | None]:
    """Boxes in pixels, one for each scene; None without boxes."""
    if not len(boxes):
        return [None] * count
    placed = [place_boxes([box], source.height, source.width, option="--box")[0] for box in boxes]
    return _repeated(placed, count, "--box")


def _repeated(values: Sequence, count: int, option: str) -> list:
    """One value for each scene; a single one is for all."""
    if len(values) not in (1, count):
        scenes = "the only scene" if count == 1 else f"each of the {count} scenes"
        raise ConfigError(f"{option} is given {len(values)} times; give it once, or once for {scenes}")
    return list(values) * (count if len(values) == 1 else 1)


def _speaker(
    source: SourceVideo,
    scene: VideoScene,
    mask: MaskMode,
    person: int | None,
    box: Float[np.ndarray, "4"] | None,
    *,
    ends_early: bool,
) -> Speaker | None:
    """The speaker of a scene; None if it is left as it is."""
    name, size = str(source.path), (source.height, source.width)
    face = choose_face(scene, person=person, box=box, name=name)
    if face is None and box is None:
        return None
    if scene.num_frames < MIN_FRAMES:
        if ends_early:
            return None
        raise MediaError(
            f"{name}: {scene} are a scene of {scene.num_frames} frames; one that is dubbed needs at least "
            f"{MIN_FRAMES}, and --person=0 leaves it as it is"
        )
    if face is None:
        speaker = still_speaker(scene, box, size, mask)
    else:
        speaker = track_speaker(scene, face, size, mask)
    check_mask(speaker, name)
    return speaker


def _reason(scene: VideoScene, person: int | None) -> str:
    if person == 0:
        return "--person=0"
    return "the audio ends too soon" if scene.faces else "no face is found"


def _untracked_frames(source: SourceVideo, scene: VideoScene, speaker: Speaker) -> list[str]:
    lost = sum(outline is None for outline in speaker.outlines)
    if not lost:
        return []
    return [f"{source.path}: in {lost} of {scene} the face is not found; these are left as they are"]


def _duration_notes(source: SourceVideo, num_frames: int, seconds: float) -> list[str]:
    lasts = float(num_frames / source.fps)
    if abs(seconds - lasts) * source.fps < 1:
        return []
    if seconds > lasts:
        return [f"The audio lasts {seconds:.2f} s and is cut to the video's {lasts:.2f} s."]
    rest = "after it the video keeps its frames, but not its sound"
    return [f"The audio lasts {seconds:.2f} of the video's {lasts:.2f} s; {rest}."]


def _nothing_to_dub(
    source: SourceVideo, scenes: Sequence[VideoScene], num_frames: int, seconds: float
) -> MediaError:
    """The error of a video in which no scene is dubbed."""
    covered = sum(scene.num_frames for scene in scenes)
    if covered < num_frames:
        return MediaError(
            f"{source.path}: the audio lasts {seconds:.2f} s, in which the video shows no face for "
            f"{MIN_FRAMES} frames; nothing would be dubbed"
        )
    if any(scene.faces for scene in scenes):
        return MediaError(f"{source.path}: every scene is left as it is; nothing would be dubbed")
    return MediaError(f"{source.path}: no face found in {num_frames} frames; say where it is with --box")
