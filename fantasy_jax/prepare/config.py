"""Settings of the preparation, with the thresholds of all filters."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from fantasy_jax.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Range, Settings
from fantasy_jax.errors import ConfigError
from fantasy_jax.preprocessing.driving import DrivingConfig
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.preprocessing.scenes import CUT_THRESHOLD


@dataclass(frozen=True)
class ClipsConfig(Settings):
    """How clips are cut from videos, and which of them are kept: what all tasks have in common.

    Size, length and frame rate of clips are those of the config section `video`: a video is scaled until it
    covers that size, and cropped around the faces.

    Attributes:
        keep_uncaptioned: Whether videos that have no caption in the side file are kept, with an empty prompt.
        max_enlargement: Videos that would have to be upscaled by more are dropped.
        cut_threshold: Threshold of PySceneDetect's ContentDetector: mean change of hue, saturation and
            brightness from one frame to the next, of 255. Its default.
        max_gap: Largest difference between the time of a frame and its own time in the file, in seconds.
            Larger ones are gaps in the file: a variable frame rate that stalls, or damage.
        min_face_frames: Fraction of frames that must have a face.
        min_face_side: Longer side of the face's box over the shorter side of the image; the lips of smaller
            faces are smaller than a latent.
        min_face_inside: Fraction of the face that lies inside the image, in the worst frame.
        min_sharpness: Variance of the Laplacian of the face, scaled to 112 pixels, brightness from 0 to 255;
            median over frames.
        test_fraction: Fraction of the videos whose clips are held out; at least one of two or more.
        batch_size: Clips that are encoded at once. One fills a device at 512 pixels.
    """

    decisive: ClassVar[tuple[str, ...]]
    """The settings that decide what a record of a clip holds, beside those that decide whether it is kept."""

    keep_uncaptioned: bool = False
    max_enlargement: PositiveFloat = 1.25
    cut_threshold: Annotated[float, Range(0, 255)] = CUT_THRESHOLD
    max_gap: NonNegativeFloat = 0.1
    min_face_frames: Fraction = 0.95
    min_face_side: Fraction = 0.15
    min_face_inside: Fraction = 0.95
    min_sharpness: NonNegativeFloat = 40.0
    test_fraction: Fraction = 0.02
    batch_size: PositiveInt = 1


@dataclass(frozen=True)
class PrepareConfig(ClipsConfig):
    """Clips of one person who talks.

    The paper drops videos with a face confidence below 0.9 and clips out of sync (arXiv 2504.04842, 4.1) and
    gives no other threshold.

    Attributes:
        max_missing_sound: Seconds of a clip's audio that may be silent because the file ends before, has a
            hole, or is damaged there; encoders cut some hundredths at the end.
        min_speech: Fraction of windows of 30 ms in which WebRTC's voice activity detector finds speech.
        speech_strictness: Mode of that detector, from 0 to 3.
        min_face_confidence: Frames with a lower confidence count as having no face; the paper's value.
        face: Number of the face to use where there are several, from 1, counted from the left; None uses the
            largest one and notes it in the log and the report.
        min_sync: Correlation of the lips' opening with the audio's RMS at the best lag within `max_lag`.
        max_lag: Lag between lips and audio, in frames, that counts as being in step.
        max_offset: Largest constant offset of a video's audio that is searched and undone, in frames; a third
            of a clip at most. Clips that correlate clearly better at such a lag than in step are dropped.
        landmarks: Settings of the detection of faces and bodies.
    """

    decisive = ("cut_threshold", "face", "landmarks")

    max_missing_sound: NonNegativeFloat = 0.2
    min_speech: Fraction = 0.4
    speech_strictness: Annotated[int, Range(0, 3)] = 2
    min_face_confidence: Fraction = 0.9
    face: PositiveInt | None = None
    min_sync: Fraction = 0.25
    max_lag: Annotated[int, Range(0, 1000)] = 1
    max_offset: Annotated[int, Range(0, 1000)] = 25
    landmarks: LandmarkConfig = LandmarkConfig()


@dataclass(frozen=True)
class PortraitPrepareConfig(ClipsConfig):
    """Clips of one or several people, each of whom is tracked over the whole clip; sound is not needed.

    Every face counts, and the worst one decides: a clip is dropped if a face comes or goes, or is small, cut
    off, blurred or still. So no face is in the background, whose tokens attend to everybody.

    The paper's data of several people have at least two, and are filtered by an aesthetic score, by blur
    (Laplacian), and by the variation of angles and of key points (arXiv 2507.12956, 3.4); it gives no
    threshold. Those here are choices, and there is no aesthetic score.

    Attributes:
        min_people: Fewest people of a clip; 2 as in the paper's data of several.
        max_people: Most people of a clip, for which records are padded.
        min_sharpness: As of all clips, but lower: faces of several people have fewer than 112 pixels, and
            enlarged ones are smoother. Faces that are blurred by 2% of their side have 3.6 to 11.5.
        min_turning: Variation of the head's angles: root of the summed variances of pitch and yaw over the
            clip, in degrees. By MediaPipe still pictures vary by up to 1.0 (docs/preparation.md), a
            calm talking face by 1.2: this alone does not drop all still pictures.
        min_expression: Variation of the key points without that of the head's pose, in distances between the
            eyes: root of `preprocessing.motion.face_intensity`. Still pictures, also noisy and shaken ones,
            have up to 0.007, a calm talking face 0.018.
        driving: Settings of detection and smoothing, those of driving videos in sampling.
    """

    decisive = ("cut_threshold", "max_people", "driving")

    min_people: PositiveInt = 1
    max_people: PositiveInt = 2
    min_sharpness: NonNegativeFloat = 10.0
    min_turning: NonNegativeFloat = 0.5
    min_expression: NonNegativeFloat = 0.01
    driving: DrivingConfig = field(default_factory=DrivingConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.min_people > self.max_people:
            raise ConfigError(
                f"min_people is {self.min_people}; it must be at most max_people ({self.max_people})"
            )
        most = self.driving.landmarks.max_faces
        if not self.driving.detection_model and most <= self.max_people:
            raise ConfigError(
                f"driving.landmarks.max_faces is {most}; it must exceed max_people ({self.max_people}), so "
                "that clips of more people are noticed"
            )
