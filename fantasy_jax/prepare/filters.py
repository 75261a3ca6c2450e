"""The filters that a clip has to pass, and all reasons why clips are dropped."""

from collections.abc import Callable
from dataclasses import dataclass

from fantasy_jax.prepare import measures
from fantasy_jax.prepare.analysis import ClipAnalysis, Dropped
from fantasy_jax.prepare.config import PrepareConfig


@dataclass(frozen=True)
class Filter:
    """A measure and its threshold.

    Attributes:
        setting: Name of the threshold in `PrepareConfig`; `max_...` is an upper bound, `min_...` a lower one.
        label: What is measured, in the report.
        message: Why a clip is dropped, with `{value}` and `{threshold}`.
        measure: Measures a clip.
    """

    setting: str
    label: str
    message: str
    measure: Callable[[ClipAnalysis], float]

    def threshold(self, config: PrepareConfig) -> float:
        """Returns the threshold."""
        return getattr(config, self.setting)

    def passes(self, value: float, config: PrepareConfig) -> bool:
        """Whether a value reaches the threshold."""
        threshold = self.threshold(config)
        return not (value > threshold if self.setting.startswith("max_") else value < threshold)


FILTERS = {
    "gap": Filter(
        "max_gap",
        "time without frames, s",
        "frames are missing for {value:.2f} s; at most {threshold:.2f} s are allowed",
        lambda clip: clip.segment.gap,
    ),
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
        lambda clip: measures.sharpness(clip.video, clip.face),
    ),
    "sync": Filter(
        "min_sync",
        "correlation of lips and audio",
        "the correlation of lips and audio is {value:.2f}; at least {threshold:.2f} is required",
        lambda clip: clip.sync(),
    ),
}
"""By reason, in the order in which they are applied, cheap ones first."""

REASONS = {
    "same": "duplicate of another file",
    "caption": "no caption",
    "unreadable": "unreadable, or unreadable from some time on",
    "crash": "crashes the process that reads it",
    "small": "would have to be upscaled",
    "no_sound": "no audio",
    "short": "scene shorter than a clip",
    "no_face": "no face",
    "error": "unexpected error",
} | {name: found.label for name, found in FILTERS.items()}
"""All reasons for which a clip or a whole video is dropped, with their titles in the report."""


def apply_filters(clip: ClipAnalysis) -> None:
    """Applies all filters in order, and notes each measure.

    Raises:
        Dropped: By the first filter that the clip does not pass, or because it lacks what a measure needs.
    """
    config = clip.task.config
    for name, found in FILTERS.items():
        value = clip.measures[name] = float(found.measure(clip))
        if not found.passes(value, config):
            raise Dropped(name, found.message.format(value=value, threshold=found.threshold(config)))
