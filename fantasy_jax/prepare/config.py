"""Settings of the preparation, with the thresholds of all filters."""

from dataclasses import dataclass
from typing import Annotated

from fantasy_jax.config import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Range, Settings
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.preprocessing.scenes import CUT_THRESHOLD


@dataclass(frozen=True)
class PrepareConfig(Settings):
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

    max_enlargement: PositiveFloat = 1.25
    cut_threshold: Annotated[float, Range(0, 255)] = CUT_THRESHOLD
    max_gap: NonNegativeFloat = 0.1
    max_missing_sound: NonNegativeFloat = 0.2
    min_speech: Fraction = 0.4
    speech_strictness: Annotated[int, Range(0, 3)] = 2
    min_face_confidence: Fraction = 0.9
    min_face_frames: Fraction = 0.95
    min_face_side: Fraction = 0.15
    min_face_inside: Fraction = 0.95
    face: PositiveInt | None = None
    min_sharpness: NonNegativeFloat = 40.0
    min_sync: Fraction = 0.25
    max_lag: Annotated[int, Range(0, 1000)] = 1
    max_offset: Annotated[int, Range(0, 1000)] = 25
    test_fraction: Fraction = 0.02
    batch_size: PositiveInt = 1
    landmarks: LandmarkConfig = LandmarkConfig()
