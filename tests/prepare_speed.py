"""CPU time of the preparation without networks: `python tests/prepare_speed.py VIDEO FACE_MODEL POSE_MODEL`.

Prints seconds of CPU time, user and system, per second of video at 512 x 512 pixels and 23 frames per second.
"""

import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from fantasy_jax.prepare import cutting, stages, store, talking
from fantasy_jax.prepare.analysis import PrepareTask
from fantasy_jax.prepare.config import PrepareConfig
from fantasy_jax.prepare.scan import SourceVideo
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.video import VideoConfig

PARTS = {"faces": "track_faces", "bodies": "track_bodies", "lip masks": "lip_mask", "crop": "crop_around"}


def main(video: str, face_model: str, pose_model: str) -> None:
    landmarks = LandmarkConfig(face_model=face_model, pose_model=pose_model)
    clips_like = VideoConfig(height=512, width=512, num_frames=81, fps=23)
    task = PrepareTask(PrepareConfig(landmarks=landmarks), clips_like)
    spent = dict.fromkeys([*PARTS, "decoding and cuts"], 0.0)
    source = SourceVideo(video, Path(video).name, "0" * 64)
    with stages.open_detectors(task.config) as detectors, ExitStack() as patched:
        for name, function in PARTS.items():
            patched.enter_context(
                patch.object(talking, function, timed(getattr(talking, function), spent, name))
            )
        work = Path(patched.enter_context(tempfile.TemporaryDirectory()))
        wall, before = time.perf_counter(), cpu()
        store.write_clips(work, source, stages.prepare_video(source, task, detectors))
        wall, total = time.perf_counter() - wall, cpu() - before
        clips = store.read_clips(work, source)
    before = cpu()
    for _ in cutting.cut(video, fps=23, num_frames=81, size=(512, 512), threshold=27.0):
        pass
    spent["decoding and cuts"] = cpu() - before
    seconds = sum(end - start for start, end in (clip.seconds for clip in clips if clip.number >= 0))
    print(f"{len(clips)} clips, {seconds:.2f} s, dropped: {[clip.dropped for clip in clips if clip.dropped]}")
    spent["the rest"] = total - sum(spent.values())
    for name, value in spent.items():
        print(f"{name:<20} {value / seconds:.3f}")
    print(f"{'all':<20} {total / seconds:.3f}, wall-clock time {wall / seconds:.3f}")


def timed(function, spent, name):
    def call(*arguments, **keywords):
        before = cpu()
        try:
            return function(*arguments, **keywords)
        finally:
            spent[name] += cpu() - before

    return call


def cpu() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    main(*sys.argv[1:])
