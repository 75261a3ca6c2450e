"""Lip masks in the pixels of videos: the area inside the lips' outer border.

    .venv/bin/python -m fantasy_jax.preprocessing.lip_mask talking.mp4 --output=out/lips.mp4

Source: arXiv 2504.04842, section 3.2 (MediaPipe's landmarks). `diffusion.losses.project_mask` resamples it
to the latent grid. The mask is empty in frames without a face; a clip whose mask is empty in all frames is
trained with the unmasked loss (`diffusion.losses.velocity_loss`).
"""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from fantasy_jax import cli, media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.files import check_outputs
from fantasy_jax.preprocessing.landmarks import FaceTrack, LandmarkConfig
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeFaces
from fantasy_jax.preprocessing.tracking import track_faces
from fantasy_jax.typing import UInt8

_DRAWN_WIDTH = 512
"""Lips are drawn at least this wide and then downscaled: in small images they are two pixels high."""
_COLOURS = ((235, 64, 52), (52, 168, 235), (120, 200, 60), (240, 190, 40))

EXAMPLES = """\
examples:
  python -m fantasy_jax.preprocessing.lip_mask talking.mp4 --output=out/lips.mp4
  python -m fantasy_jax.preprocessing.lip_mask talking.mp4 --output=out/lips.mp4 \\
      --face_model=face_landmarker.task
"""


def lip_mask(face: FaceTrack, height: int, width: int) -> UInt8[np.ndarray, "T {height} {width}"]:
    """Returns the mask of one face's lips: 255 inside, 0 outside, in between where the border cuts a pixel.

    Args:
        face: The tracked face; for several faces take the maximum of their masks.
        height: Of the video.
        width: Of the video.
    """
    mask = np.zeros((len(face.points), height, width), np.uint8)
    border = face.points[:, list(face.layout.outer_lips), :2]
    for index in np.flatnonzero(face.present):
        points = border[index]
        left, top = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
        right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int), (width, height))
        if left >= right or top >= bottom:
            continue  # outside of the image
        scale = max(-(-_DRAWN_WIDTH // int(right - left)), 2)
        finer = np.zeros(((bottom - top) * scale, (right - left) * scale), np.uint8)
        # The origin of landmarks is the corner of the first pixel, that of OpenCV its centre.
        cv2.fillPoly(finer, [np.round((points - (left, top)) * scale - 0.5).astype(np.int32)], 255)
        size = (int(right - left), int(bottom - top))
        mask[index, top:bottom, left:right] = cv2.resize(finer, size, interpolation=cv2.INTER_AREA)
    return mask


def draw_overlay(
    video: UInt8[np.ndarray, "T H W 3"], faces: Sequence[FaceTrack]
) -> UInt8[np.ndarray, "T H W 3"]:
    """Draws the lip mask, landmarks, number and confidence of every face, each in its own colour."""
    shown = video.copy()
    _, height, width, _ = video.shape
    for number, face in enumerate(faces):
        colour = _COLOURS[number % len(_COLOURS)]
        dot = max(round(face.size / 300), 1)
        for index, mask in enumerate(lip_mask(face, height, width)):
            if not face.present[index]:
                continue
            inside = mask > 0
            opacity = mask[inside, None] / 255 * 0.6
            shown[index, inside] = shown[index, inside] * (1 - opacity) + np.array(colour) * opacity
            for x, y in face.points[index, :, :2].round().astype(int):
                cv2.circle(shown[index], (int(x), int(y)), dot, colour, -1)
            left, top = (int(side) for side in face.boxes[index, :2])
            label = f"{number + 1}: {face.score[index]:.2f}"
            size = face.size / 350
            cv2.putText(shown[index], label, (left, top), cv2.FONT_HERSHEY_SIMPLEX, size, colour, 2 * dot)
    return shown


def main(argv: list[str] | None = None) -> None:
    """Runs the command line: writes a video with the overlay."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.preprocessing.lip_mask",
        description="Draws the facial landmarks and lip masks of a video.",
        epilog=EXAMPLES,
    )
    parser.add_argument("video", help="video with faces")
    parser.add_argument("--output", required=True, metavar="FILE", help="mp4 file to write")
    parser.add_argument(
        "--face_model",
        default=LandmarkConfig.face_model,
        metavar="FILE",
        help="MediaPipe's FaceLandmarker (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    media.video_format(arguments.output)
    check_outputs([arguments.output], [arguments.video, arguments.face_model])
    media.probe_video(arguments.video)
    config = replace(LandmarkConfig(), face_model=arguments.face_model)
    with MediaPipeFaces(config) as detector:
        video, fps = media.read_video(arguments.video)
        faces = track_faces(detector, video, config, progress=True)
    if not faces:
        raise ConfigError(f"{arguments.video}: no face found")
    for number, face in enumerate(faces, 1):
        areas = lip_mask(face, *video.shape[1:3])[face.present].mean(axis=(1, 2)) / 255
        print(
            f"Face {number}: in {face.present.sum()} of {len(video)} frames, {face.size:.0f} pixels, "
            f"confidence {face.score[face.present].mean():.2f}, "
            f"lips {areas.min():.2%} to {areas.max():.2%} of the image"
        )
    try:
        media.read_audio(arguments.video)
        audio = arguments.video
    except MediaError:
        audio = None
    media.write_video(arguments.output, draw_overlay(video, faces), round(fps), audio=audio)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.preprocessing.lip_mask")
