"""Settings of the preparation, with the thresholds of all filters."""

from dataclasses import dataclass

from fantasy_jax.errors import ConfigError
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.preprocessing.scenes import CUT_THRESHOLD

_FRACTIONS = (
    *("min_speech", "min_face_confidence", "min_face_frames", "min_face_side", "min_face_inside"),
    *("min_sync", "test_fraction"),
)


@dataclass(frozen=True)
class PrepareConfig:
    """How clips are cut from videos, and which of them are kept.

    The paper drops videos with a face confidence below 0.9 and clips out of sync (arXiv 2504.04842, 4.1) and
    gives no other threshold. Size, length and frame rate of clips are those of the config section `video`: a
    video is scaled until it covers that size, and cropped around the face.

    Attributes:
        max_enlargement: Videos that would have to be upscaled by more are dropped.
        cut_threshold: Threshold of PySceneDetect's ContentDetector: mean change of hue, saturation and
            brightness from one frame to the next, of 255. Its default.
        max_gap: Largest difference between the time of a frame and its own time in the file, in seconds.
            Larger ones are gaps in the file: a variable frame rate that stalls, or damage.
        max_missing_sound: Seconds of a clip's audio that may be silent because the file ends before, has a
            hole, or is damaged there; encoders cut some hundredths at the end.
        min_speech: Fraction of windows of 30 ms in which WebRTC's voice activity detector finds speech.
        speech_strictness: Mode of that detector, from 0 to 3.
        min_face_confidence: Frames with a lower confidence count as having no face; the paper's value.
        min_face_frames: Fraction of frames that must have a face.
        min_face_side: Longer side of the face's box over the shorter side of the image; the lips of smaller
            faces are smaller than a latent.
        min_face_inside: Fraction of the face's landmarks that lie inside the image, in the worst frame.
        face: Number of the face to use where there are several, from 1, counted from the left; None uses the
            largest one and notes it in the log and the report.
        min_sharpness: Variance of the Laplacian of the face, scaled to 112 pixels, brightness from 0 to 255;
            median over frames.
        min_sync: Correlation of the lips' opening with the audio's RMS at the best lag within `max_lag`.
        max_lag: Lag between lips and audio, in frames, that counts as being in step.
        max_offset: Largest constant offset of a video's audio that is searched and undone, in frames; a third
            of a clip at most. Clips that correlate clearly better at such a lag than in step are dropped.
        test_fraction: Fraction of the videos whose clips are held out; at least one of two or more.
        batch_size: Clips that are encoded at once. One fills a device at 512 pixels.
        landmarks: Settings of the detection of faces and bodies.
    """

    max_enlargement: float = 1.25
    cut_threshold: float = CUT_THRESHOLD
    max_gap: float = 0.1
    max_missing_sound: float = 0.2
    min_speech: float = 0.4
    speech_strictness: int = 2
    min_face_confidence: float = 0.9
    min_face_frames: float = 0.95
    min_face_side: float = 0.15
    min_face_inside: float = 0.95
    face: int | None = None
    min_sharpness: float = 40.0
    min_sync: float = 0.25
    max_lag: int = 1
    max_offset: int = 25
    test_fraction: float = 0.02
    batch_size: int = 1
    landmarks: LandmarkConfig = LandmarkConfig()

    def __post_init__(self):
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.face is not None and self.face < 1:
            raise ConfigError(f"face is {self.face}; it must be at least 1, the first face from the left")
        if not 0 <= self.speech_strictness <= 3:
            raise ConfigError(f"speech_strictness is {self.speech_strictness}; it must lie between 0 and 3")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1")
