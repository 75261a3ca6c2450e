"""Settings of the preparation: every threshold that a clip has to pass."""

from dataclasses import dataclass

from fantasy_jax.config import ConfigError
from fantasy_jax.data.landmarks import LandmarkConfig

_SHARES = (
    *("min_speech", "min_face_confidence", "min_face_frames", "min_face_side", "min_face_inside"),
    *("min_sync", "test_share"),
)


@dataclass(frozen=True)
class PrepareConfig:
    """How clips are cut from videos, and which of them are kept.

    The paper says that videos with a face confidence below 0.9 and clips out of sync are dropped (arXiv
    2504.04842, 4.1); it gives no other threshold. Length and rate of clips are those of `sample`.

    Attributes:
        size: Height and width of clips in pixels. A video is scaled until it covers this, and cut around the
            face; batches are of one size.
        max_enlargement: Videos that would have to be enlarged by more are dropped.
        cut_threshold: Of PySceneDetect's ContentDetector: mean change of hue, saturation and brightness, of
            255, from one frame to the next. Its default.
        max_gap: Seconds by which a frame may be shown too early or late. In what is beyond, the file has no
            frames: a varying rate that stands still, or damage.
        max_missing_sound: Seconds at a clip's end that may lack sound; coders cut some hundredths off.
        min_speech: Share of a clip's thirtieths of a second in which WebRTC's detector hears speech.
        speech_strictness: Of that detector, from 0 to 3.
        min_face_confidence: A frame with less has no face; the paper's.
        min_face_frames: Share of frames that need one.
        min_face_side: Longer side of the face's box over the shorter side of the picture; smaller lips than
            this allows are less than a latent.
        min_face_inside: Share of the face's points that lie inside of the picture, in the worst frame.
        face: Which face is meant where there are several, from the left, beginning with 1. None takes the
            largest, and says so.
        min_sharpness: Variance of the Laplacian of the face, scaled to 112 pixels, brightness from 0 to 255;
            median over the frames.
        min_sync: Correlation of the lips' opening with the sound's energy at the best lag.
        max_lag: Frames that sound may lead or follow.
        test_share: Share of the videos whose clips are held out; at least one where there are two.
        batch_size: Clips that are encoded at once. One fills a device at 512 pixels.
        landmarks: How faces and bodies are found.
    """

    size: tuple[int, int] = (512, 512)
    max_enlargement: float = 1.25
    cut_threshold: float = 27.0
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
    max_lag: int = 4
    test_share: float = 0.02
    batch_size: int = 1
    landmarks: LandmarkConfig = LandmarkConfig()

    def __post_init__(self):
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if any(side < 16 or side % 16 for side in self.size):
            raise ConfigError(f"size is {self.size}; multiples of 16 are needed")
        if self.face is not None and self.face < 1:
            raise ConfigError(f"face is {self.face}; faces are counted from the left, beginning with 1")
        if not 0 <= self.speech_strictness <= 3:
            raise ConfigError(f"speech_strictness is {self.speech_strictness}; it goes from 0 to 3")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; at least 1 is needed")
