"""Small videos of drawn faces, and detectors that know how they are drawn.

Run as a program it is `python -m fantasy_jax.data.prepare` with these detectors, and without networks.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np

from fantasy_jax import media
from fantasy_jax.data.landmarks import MEDIAPIPE_FACE, Body, Face
from fantasy_jax.data.prepare.stages import Detectors
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.data.voices import draw_voice, speak

FPS, FRAMES, SIZE = 25, 9, 64

CONFIG = """
from fantasy_jax.config import load_config, to_config_dict
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig


def get_config():
    config = load_config("configs/fantasy_talking_14b.py:debug")
    config.model.vae.update(dim=4, num_res_blocks=1)
    config.model.image_encoder.update(image_size=28)
    config.model.text_encoder.update(num_layers=1)
    adapters = {
        "motion_adapter": MotionAdapterConfig(hidden=8, width=48),
        "identity_adapter": IdentityAdapterConfig(
            feature_width=8, feature_size=8, num_queries=2, depth=1, token_width=16, token_heads=2,
            width=48, num_heads=4, num_layers=2,
        ),
        "face_encoder": FaceEncoderConfig(depths=(1, 1), widths=(4, 8), embedding=8, image_size=32),
    }
    with config.ignore_type(), config.model.unlocked():
        config.model.update(to_config_dict(adapters))
    config.model.audio_adapter.feature_width = 24
    config.sample.update(fps=25, max_frames=9)
    config.prepare.update(min_speech=0.0, min_sharpness=1.0, batch_size=2, test_share=0.3)
    config.train.clip_stage.update(steps=1, batch_size=2)
    config.train.frame_stage.update(steps=1, batch_size=2)
    config.train.loop.update(workers=0)
    return config
"""
"""Settings under which everything is small."""

_SKIN, _MOUTH = np.array([220, 60, 60]), np.array([40, 60, 220])


def draw(openings, *, background=30, centers=((32, 28),), size=(SIZE, SIZE), seed=0):
    """Frames with faces: red boxes, in each a blue mouth of this opening; a texture, for sharpness."""
    rng = np.random.default_rng(seed)
    frames = np.full((len(openings), *size, 3), background, np.uint8)
    for number, (x, y) in enumerate(centers):
        half = 18 - 6 * number
        texture = rng.integers(0, 30, (2 * half, 2 * half, 1))
        for frame, opening in zip(frames, openings, strict=True):
            top, left = y - half, x - half
            inside = frame[max(top, 0) : y + half, max(left, 0) : x + half]
            inside[:] = (_SKIN - texture)[-inside.shape[0] :, -inside.shape[1] :]
            tall = 1 + round(6 * float(opening))
            frame[y + half // 2 : y + half // 2 + tall, max(x - 6, 0) : x + 6] = _MOUTH
    return frames


def write_talk(path, *, num_frames=2 * FRAMES, seed=0, fps=FPS, sound=True, **drawn):
    """A video of a face that speaks; different seeds are different videos."""
    rng = np.random.default_rng(seed)
    speech = speak(rng, draw_voice(rng), num_frames=num_frames, fps=fps)
    wav = path.with_suffix(".wav")
    media.write_sound(wav, np.round(speech.waveform * 32767).astype(np.int16), SAMPLE_RATE)
    frames = draw(speech.opening, seed=seed, **drawn)
    media.write_video(path, frames, fps, sound=wav if sound else None)
    wav.unlink()


class DrawnFaces:
    """Finds red boxes."""

    layout = MEDIAPIPE_FACE
    _template = np.random.default_rng(0).uniform(-1, 1, (468, 3)).astype(np.float32)

    def detect(self, picture):
        """All faces."""
        red, green, blue = (picture[..., i].astype(int) for i in range(3))
        face = ((red > 120) & (green < 110) & (blue < 110)) | ((blue > 140) & (red < 110))
        columns = np.flatnonzero(face.sum(axis=0) > 8)
        faces = []
        for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
            rows = np.flatnonzero(face[:, run].any(axis=1)) if run.size else run
            if rows.size > 8:
                crop = picture[rows[0] : rows[-1] + 1, run[0] : run[-1] + 1]
                faces.append(self._face(crop, run[0], rows[0]))
        return sorted(faces, key=lambda face: -(face.box[2] - face.box[0]))

    def _face(self, crop, left, top):
        height, width = crop.shape[:2]
        mouth = (crop[..., 2].astype(int) > 140) & (crop[..., 0] < 110)
        rows = np.flatnonzero(mouth.sum(axis=1) > 3)
        upper, lower = (rows[0], rows[-1] + 1) if rows.size else (height // 2, height // 2)
        if left == 0:  # as deep as it is high, most of it outside
            left, width = left + width - height, height
        middle = np.array([left + width / 2, top + height / 2, 0], np.float32)
        points = middle + self._template * np.array([width / 2, height / 2, 1], np.float32)
        angles = np.linspace(0, 2 * np.pi, len(self.layout.outer_lips), endpoint=False)
        around = np.stack([6 * np.cos(angles), (lower - upper + 2) / 2 * np.sin(angles), 0 * angles], axis=-1)
        mouth_middle = np.array([left + width / 2, top + (upper + lower) / 2, 0])
        points[list(self.layout.outer_lips)] = around + mouth_middle
        for index, y in zip(self.layout.lip_middles, (upper, lower), strict=True):
            points[index] = [left + width / 2, top + y, 0]
        box = np.array([left, top, left + width, top + height], np.float32)
        return Face(points.astype(np.float32), 0.95, box)


class DrawnBodies:
    """A body below each face."""

    def detect(self, picture):
        """All bodies."""
        joints = np.random.default_rng(1).uniform(-10, 40, (17, 2)).astype(np.float32)
        joints[0] = 0
        return [
            Body((face.box[:2] + face.box[2:]) / 2 + joints, np.ones(17, np.float32))
            for face in DrawnFaces().detect(picture)
        ]


@contextmanager
def open_fakes(config) -> Iterator[Detectors]:
    """These two, in place of MediaPipe's."""
    yield Detectors(DrawnFaces(), DrawnBodies())


class QuickEncoder:
    """Stands for `ClipEncoder` where not the networks are tested, but what is done with their results."""

    def __init__(self, networks, *, batch_size, texts=None):
        self._texts = texts or quick_text

    def __call__(self, records):
        """Encodes a batch."""
        return [
            {
                "latents": record["video"].mean(axis=(1, 2)).astype(np.float32),
                "lips": record["lips"].mean(axis=(1, 2)).astype(np.float32),
                "text": self._texts(record["prompt"]),
                "sound": record["sound"],
            }
            for record in records
        ]


def quick_text(prompt):
    """Stands for a prompt's tokens."""
    return np.full((1 + len(prompt), 2), len(prompt), np.float32)


@contextmanager
def without_networks():
    """The preparation with these two in place of networks."""
    places = ("fantasy_jax.data.prepare.encode", "fantasy_jax.data.prepare.beam")
    with ExitStack() as patched:
        for place in places:
            if place in sys.modules:
                patched.enter_context(patch(f"{place}.ClipEncoder", QuickEncoder))
        texts = lambda networks, prompts: [quick_text(prompt)[None] for prompt in prompts]  # noqa: E731
        patched.enter_context(patch(f"{places[0]}.encode_text", texts))
        yield


if __name__ == "__main__":
    from fantasy_jax import cli
    from fantasy_jax.data.prepare.command import main

    with without_networks():
        cli.run(partial(main, open_detectors=open_fakes), "prepare")
