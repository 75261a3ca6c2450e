"""What the filters of portrait clips measure: `python tests/prepare_people.py FACE_MODEL VIDEO...`.

Prints the measures of the first 81 frames of each video at 25 frames per second, scaled to 480 pixels; the
sharpness if they are blurred by 2% of the faces' side; and the variation of the first frame as a still
picture, without and with noise, and shaken.
"""

import sys

import cv2
import numpy as np

from fantasy_jax import media
from fantasy_jax.prepare.analysis import PrepareTask
from fantasy_jax.prepare.config import PortraitPrepareConfig
from fantasy_jax.prepare.cutting import Segment, covering
from fantasy_jax.prepare.filters import PORTRAIT
from fantasy_jax.prepare.portrait import PortraitClip
from fantasy_jax.prepare.stages import open_detectors
from fantasy_jax.preprocessing.driving import DrivingConfig
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.video import VideoConfig

FRAMES, STILL, SIDE = 81, 41, 480


def main(face_model: str, *videos: str) -> None:
    driving = DrivingConfig(landmarks=LandmarkConfig(face_model=face_model))
    config = PortraitPrepareConfig(max_people=3, driving=driving)
    with open_detectors(config) as detectors:

        def clip_of(frames):
            size = tuple(side // 16 * 16 for side in frames.shape[1:3])
            task = PrepareTask(config, VideoConfig(*size, FRAMES, 25))
            return PortraitClip(Segment(0, frames, len(frames), 0.0), task, detectors)

        for path in videos:
            info = media.probe_video(path)
            size = covering(info.height, info.width, (SIDE, SIDE))
            frames = (frame for _, frame in media.stream_video(path, 25, size))
            video = np.stack([frame for frame, _ in zip(frames, range(FRAMES), strict=False)])
            clip = clip_of(video)
            show(path, clip, ("face_side", "sharpness", "turning", "expression"))
            blur = 0.02 * np.mean(clip.boxes[..., 2:] - clip.boxes[..., :2])
            blurred = clip_of(np.stack([cv2.GaussianBlur(frame, (0, 0), blur) for frame in video]))
            show("  blurred", blurred, ("sharpness",))
            still, rng = video[:1].repeat(STILL, axis=0), np.random.default_rng(0)
            noisy = (still + rng.normal(0, 4, still.shape)).clip(0, 255).astype(np.uint8)
            shaken = np.stack([np.roll(frame, rng.integers(-4, 5, 2), (0, 1)) for frame in still])
            for name, picture in (("still", still), ("noisy", noisy), ("shaken", shaken)):
                show(f"  {name}", clip_of(picture), ("turning", "expression"))


def show(name, clip, measures):
    found = ", ".join(f"{key} {float(PORTRAIT[key].measure(clip)):.3g}" for key in measures)
    print(f"{name}: {clip.count} people, the worst has {found}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
