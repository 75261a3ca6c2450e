"""Small videos of drawn faces, and detectors that know how they are drawn.

As a program this file is `python -m fantasy_jax.prepare` with these detectors and without networks.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np

from fantasy_jax import media
from fantasy_jax.miniature.voices import draw_voice, speak
from fantasy_jax.prepare.analysis import Detectors
from fantasy_jax.preprocessing.landmarks import MEDIAPIPE_FACE, DetectedBody, DetectedFace
from fantasy_jax.video import SAMPLE_RATE

FPS, FRAMES, SIZE = 25, 9, 64

CONFIG = """
from fantasy_jax.config import load_config, to_config_dict
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.system.model import ModelConfig


def get_config():
    config = load_config("configs/fantasy_talking_14b.py:debug")
    config.model.vae.update(dim=4, num_res_blocks=1)
    config.model.image_encoder.update(image_size=28)
    config.model.text_encoder.update(num_layers=1)
    model = ModelConfig.from_config(config.model, "model").replace(
        motion_adapter=MotionAdapterConfig(hidden=8, width=48),
        identity_adapter=IdentityAdapterConfig(
            feature_width=8, feature_size=8, num_queries=2, depth=1, token_width=16, token_heads=2,
            width=48, num_heads=4, num_layers=2,
        ),
        face_encoder=FaceEncoderConfig(depths=(1, 1), widths=(4, 8), embedding=8, image_size=32),
    )
    config.model = to_config_dict({"model": model}).model
    config.video.update(height=64, width=64, num_frames=9, fps=25)
    config.prepare.update(min_speech=0.0, min_sharpness=1.0, batch_size=2, test_fraction=0.3)
    return config
"""
"""Settings under which everything is small."""

_SKIN, _MOUTH = np.array([220, 60, 60]), np.array([40, 60, 220])


def draw(openings, *, background=30, centers=((32, 28),), size=(SIZE, SIZE), seed=0):
    """Draws frames with faces: textured red boxes, each with a blue mouth of the given opening."""
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


def write_talk(path, *, num_frames=2 * FRAMES, seed=0, fps=FPS, audio=True, **drawn):
    """Writes a video of a face that speaks; different seeds give different videos."""
    rng = np.random.default_rng(seed)
    speech = speak(rng, draw_voice(rng), num_frames=num_frames, fps=fps)
    wav = path.with_suffix(".wav")
    media.write_audio(wav, np.round(speech.waveform * 32767).astype(np.int16), SAMPLE_RATE)
    frames = draw(speech.opening, seed=seed, **drawn)
    media.write_video(path, frames, fps, audio=wav if audio else None)
    wav.unlink()


class DrawnFaces:
    """Detects red boxes."""

    layout = MEDIAPIPE_FACE
    _template = np.random.default_rng(0).uniform(-1, 1, (468, 3)).astype(np.float32)

    def detect(self, image):
        """Returns all faces."""
        red, green, blue = (image[..., i].astype(int) for i in range(3))
        face = ((red > 120) & (green < 110) & (blue < 110)) | ((blue > 140) & (red < 110))
        columns = np.flatnonzero(face.sum(axis=0) > 8)
        faces = []
        for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
            rows = np.flatnonzero(face[:, run].any(axis=1)) if run.size else run
            if rows.size > 8:
                crop = image[rows[0] : rows[-1] + 1, run[0] : run[-1] + 1]
                faces.append(self._face(crop, run[0], rows[0]))
        return sorted(faces, key=lambda face: -(face.box[2] - face.box[0]))

    def _face(self, crop, left, top):
        height, width = crop.shape[:2]
        mouth = (crop[..., 2].astype(int) > 140) & (crop[..., 0] < 110)
        rows = np.flatnonzero(mouth.sum(axis=1) > 3)
        upper, lower = (rows[0], rows[-1] + 1) if rows.size else (height // 2, height // 2)
        if left == 0:  # as wide as it is high, most of it outside
            left, width = left + width - height, height
        center = np.array([left + width / 2, top + height / 2, 0], np.float32)
        points = center + self._template * np.array([width / 2, height / 2, 1], np.float32)
        angles = np.linspace(0, 2 * np.pi, len(self.layout.outer_lips), endpoint=False)
        around = np.stack([6 * np.cos(angles), (lower - upper + 2) / 2 * np.sin(angles), 0 * angles], axis=-1)
        mouth_center = np.array([left + width / 2, top + (upper + lower) / 2, 0])
        points[list(self.layout.outer_lips)] = around + mouth_center
        for index, y in zip(self.layout.lip_middles, (upper, lower), strict=True):
            points[index] = [left + width / 2, top + y, 0]
        box = np.array([left, top, left + width, top + height], np.float32)
        return DetectedFace(points.astype(np.float32), 0.95, box)


class DrawnBodies:
    """Places a body below each face."""

    def detect(self, image):
        """Returns all bodies."""
        joints = np.random.default_rng(1).uniform(-10, 40, (17, 2)).astype(np.float32)
        joints[0] = 0
        return [
            DetectedBody((face.box[:2] + face.box[2:]) / 2 + joints, np.ones(17, np.float32))
            for face in DrawnFaces().detect(image)
        ]


@contextmanager
def open_fakes(config) -> Iterator[Detectors]:
    """Opens these two, in place of MediaPipe's."""
    yield Detectors(DrawnFaces(), DrawnBodies())


class QuickEncoder:
    """Replaces `ClipEncoder` in tests of what is done with its results."""

    def __init__(self, networks, *, batch_size, texts=None):
        self._texts = texts or quick_text

    def __call__(self, records):
        """Encodes a batch."""
        return [
            {
                "latents": record["video"].mean(axis=(1, 2)).astype(np.float32),
                "lips": record["lips"].mean(axis=(1, 2)).astype(np.float32),
                "text": self._texts(record["prompt"]),
                "waveform": record["waveform"],
            }
            for record in records
        ]


def quick_text(prompt):
    """Replaces the tokens of a prompt."""
    return np.full((1 + len(prompt), 2), len(prompt), np.float32)


@contextmanager
def without_networks():
    """Replaces the networks of the preparation by these two."""
    places = ("fantasy_jax.prepare.encode", "fantasy_jax.prepare.beam")
    with ExitStack() as patched:
        for place in places:
            if place in sys.modules:
                patched.enter_context(patch(f"{place}.ClipEncoder", QuickEncoder))
        texts = lambda networks, prompts: [quick_text(prompt)[None] for prompt in prompts]  # noqa: E731
        patched.enter_context(patch(f"{places[0]}.encode_text", texts))
        yield


def assert_equal_records(one, other):
    """Records by split, which must be equal in content and type."""
    assert one.keys() == other.keys()
    for split in one:
        assert len(one[split]) == len(other[split])
        for a, b in zip(one[split], other[split], strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)
            assert all(a[name].dtype == b[name].dtype for name in a)


if __name__ == "__main__":
    from fantasy_jax import cli
    from fantasy_jax.prepare.command import main

    with without_networks():
        cli.run(partial(main, open_detectors=open_fakes), "prepare")
