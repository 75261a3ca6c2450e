"""Real videos and MediaPipe's models, which are not kept here: they lie in `shared` beside the project."""

from functools import cache
from pathlib import Path

import pytest

from fantasy_jax import media
from fantasy_jax.data.landmarks import LandmarkConfig, MediaPipeFaces, track_faces

SHARED = Path(__file__).parents[2] / "shared"
FACE_MODEL, POSE_MODEL = (SHARED / "models" / f"{name}_landmarker.task" for name in ("face", "pose"))
CONFIG = LandmarkConfig(face_model=str(FACE_MODEL), pose_model=str(POSE_MODEL))


def need_mediapipe():
    """Skips, loudly, where the package or its models are missing."""
    pytest.importorskip("mediapipe", reason="pip install 'fantasy_jax[prepare]'", exc_type=ImportError)
    if not FACE_MODEL.is_file() or not POSE_MODEL.is_file():
        pytest.skip(f"needs {FACE_MODEL} and {POSE_MODEL}")


@cache
def tracked(name):
    """A video, its frames a second, its sound's path, and its faces."""
    need_mediapipe()
    path = SHARED / "media" / name
    video, fps = media.read_video(path)
    with MediaPipeFaces(CONFIG) as detector:
        return video, fps, path, track_faces(detector, video, CONFIG)
