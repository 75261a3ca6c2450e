"""Real videos and MediaPipe's models, which are not in the repository but in `shared` beside it."""

import os
from functools import cache
from pathlib import Path

import pytest

from fantasy_jax import media
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeFaces
from fantasy_jax.preprocessing.tracking import track_faces

SHARED = Path(__file__).parents[2] / "shared"
FACE_MODEL, POSE_MODEL = (SHARED / "models" / f"{name}_landmarker.task" for name in ("face", "pose"))
CONFIG = LandmarkConfig(face_model=str(FACE_MODEL), pose_model=str(POSE_MODEL))


def need_mediapipe():
    """Skips the test where MediaPipe or its models are missing; fails it in continuous integration."""
    try:
        import mediapipe  # noqa: F401
    except ImportError as error:
        _skip(f"mediapipe cannot be imported ({error}); pip install 'fantasy_jax[prepare]'")
    for model in (FACE_MODEL, POSE_MODEL):
        if not model.is_file():
            _skip(f"{model} is missing")


def _skip(reason):
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; these tests must not be skipped in continuous integration")
    pytest.skip(reason)


def case_file(name):
    """Returns the path of a file that once went wrong, likewise (`shared/cases/README.md`)."""
    return media_file(name, "cases")


def media_file(name, folder="media"):
    """Returns the path of a video or image; skips or fails the test likewise where it is missing."""
    path = SHARED / folder / name
    if not path.is_file():
        _skip(f"{path} is missing")
    return path


@cache
def tracked(name):
    """Returns a video, its frame rate, its path, and its faces."""
    need_mediapipe()
    path = media_file(name)
    video, fps = media.read_video(path)
    with MediaPipeFaces(CONFIG) as detector:
        return video, fps, path, track_faces(detector, video, CONFIG)
