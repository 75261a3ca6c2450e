"""The filters that a clip has to pass, and all reasons why clips are dropped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fantasy_jax.prepare import measures
from fantasy_jax.prepare.analysis import ClipAnalysis, Dropped
from fantasy_jax.prepare.config import ClipsConfig, PortraitPrepareConfig


@dataclass(frozen=True)
class Filter:
    """A measure and its threshold.

    Attributes:
        setting: Name of the threshold in the settings; `max_...` is an upper bound, `min_...` a lower one.
        label: What is measured, in the report.
        message: Why a clip is dropped, with `{value}` and `{threshold}`.
        measure: Measures a clip, of the task that the filter is for.
    """

    setting: str
    label: str
    message: str
    measure: Callable[[Any], float]

    def threshold(self, config: ClipsConfig) -> float:
        """Returns the threshold."""
        return float(getattr(config, self.setting))

    def passes(self, value: float, config: ClipsConfig) -> bool:
        """Whether a value reaches the threshold."""
        threshold = self.threshold(config)
        return not (value > threshold if self.setting.startswith("max_") else value < threshold)


_GAP = Filter(
    "max_gap",
    "time without frames, s",
    "frames are missing for {value:.2f} s; at most {threshold:.2f} s are allowed",
    lambda clip: clip.segment.gap,
)

TALKING = {
    "gap": _GAP,
    "missing_sound": Filter(
        "max_missing_sound",
        "missing audio, s",
        "{value:.2f} s of the audio are missing; at most {threshold:.2f} s are allowed",
        lambda clip: clip.missing_seconds,
    ),
    "speech": Filter(
        "min_speech",
        "fraction with speech",
        "speech in {value:.0%} of the clip; at least {threshold:.0%} is required",
        lambda clip: measures.speech_fraction(clip.waveform, clip.task.config.speech_strictness),
    ),
    "face_frames": Filter(
        "min_face_frames",
        "fraction of frames with a confident face",
        "a confident face in {value:.0%} of the frames; at least {threshold:.0%} is required",
        lambda clip: clip.confident.mean(),
    ),
    "face_side": Filter(
        "min_face_side",
        "side of the face over that of the image",
        "the face takes {value:.0%} of the image's shorter side; at least {threshold:.0%} is required",
        lambda clip: clip.face.size / min(clip.task.video.size),
    ),
    "face_inside": Filter(
        "min_face_inside",
        "fraction of the face inside the image",
        "{value:.0%} of the face is inside the image; at least {threshold:.0%} is required",
        lambda clip: measures.fraction_inside(clip.face, *clip.task.video.size),
    ),
    "sharpness": Filter(
        "min_sharpness",
        "sharpness (variance of the Laplacian)",
        "the sharpness of the face is {value:.0f}; at least {threshold:.0f} is required",
        lambda clip: measures.sharpness(clip.video, clip.face.boxes),
    ),
    "sync": Filter(
        "min_sync",
        "correlation of lips and audio",
        "the correlation of lips and audio is {value:.2f}; at least {threshold:.2f} is required",
        lambda clip: clip.sync(),
    ),
}
"""Filters of clips of one person who talks, by reason, in the order in which they are applied, cheap ones
first."""

PORTRAIT = {
    "gap": _GAP,
    "few_people": Filter(
        "min_people",
        "people",
        "there are fewer people, {value:.0f}, than the {threshold:.0f} that are required",
        lambda clip: clip.count,
    ),
    "many_people": Filter(
        "max_people",
        "people",
        "there are more people, {value:.0f}, than the {threshold:.0f} that are allowed",
        lambda clip: clip.count,
    ),
    "face_frames": Filter(
        "min_face_frames",
        "fraction of frames with the face",
        "a face is found in {value:.0%} of the frames; at least {threshold:.0%} is required",
        lambda clip: min(person.found.mean() for person in clip.people),
    ),
    "face_side": Filter(
        "min_face_side",
        "side of the face over that of the image",
        "a face takes {value:.0%} of the image's shorter side; at least {threshold:.0%} is required",
        lambda clip: min(map(measures.mean_side, clip.boxes)) / min(clip.task.video.size),
    ),
    "face_inside": Filter(
        "min_face_inside",
        "fraction of the face inside the image",
        "{value:.0%} of a face is inside the image; at least {threshold:.0%} is required",
        lambda clip: min(measures.box_inside(boxes, *clip.task.video.size) for boxes in clip.boxes),
    ),
    "sharpness": Filter(
        "min_sharpness",
        "sharpness (variance of the Laplacian)",
        "the sharpness of a face is {value:.0f}; at least {threshold:.0f} is required",
        lambda clip: min(measures.sharpness(clip.video, boxes) for boxes in clip.boxes),
    ),
    "turning": Filter(
        "min_turning",
        "variation of the head's angles, degrees",
        "a head's angles vary by {value:.2f} degrees; at least {threshold:.2f} are required",
        lambda clip: min(measures.turning(faces, clip.layout) for faces in clip.detections),
    ),
    "expression": Filter(
        "min_expression",
        "variation of the key points without pose",
        "the key points of a face vary by {value:.1%} of the distance between the eyes; at least "
        "{threshold:.1%} is required",
        lambda clip: min(measures.expression(faces, clip.layout) for faces in clip.detections),
    ),
}
"""Filters of clips of people who act, likewise. The worst face decides."""

_REASONS = {
    "same": "duplicate of another file",
    "caption": "no caption",
    "unreadable": "unreadable, or unreadable from some time on",
    "crash": "crashes the process that reads it",
    "small": "would have to be upscaled",
    "no_sound": "no audio",
    "short": "scene shorter than a clip",
    "no_face": "no face",
    "few_people": "fewer people than required",
    "many_people": "more people than allowed",
    "error": "unexpected error",
}


def filters_of(config: ClipsConfig) -> Mapping[str, Filter]:
    """The filters that the settings are for."""
    return PORTRAIT if isinstance(config, PortraitPrepareConfig) else TALKING


def reasons_of(config: ClipsConfig) -> dict[str, str]:
    """All reasons for which a clip or a whole video is dropped, with their titles in the report."""
    return {name: found.label for name, found in filters_of(config).items()} | _REASONS


def apply_filters(clip: ClipAnalysis) -> None:
    """Applies all filters in order, and notes each measure.

    Raises:
        Dropped: By the first filter that the clip does not pass, or because it lacks what a measure needs.
    """
    config = clip.task.config
    for name, found in filters_of(config).items():
        value = clip.measures[name] = float(found.measure(clip))
        if not found.passes(value, config):
            raise Dropped(name, found.message.format(value=value, threshold=found.threshold(config)))
