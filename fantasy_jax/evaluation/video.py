"""Measures a finished video: agreement of mouth and audio, motion, and similarity to the portrait.

    .venv/bin/python -m fantasy_jax.evaluation.video out/demo.mp4 --image=portrait.png

No ground truth is needed: the mouth opening measured from the pixels is correlated with the energy of the
audio, since mouths open on stressed syllables and close in pauses. Real speakers reach about 0.4 to 0.6.
"""

import json

import numpy as np

from fantasy_jax import cli, media
from fantasy_jax.evaluation.metrics import correlation, psnr, windowed_rms
from fantasy_jax.evaluation.motion import motion
from fantasy_jax.evaluation.mouth import mouth_opening
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.preprocessing.boxes import parse_box, place_boxes
from fantasy_jax.preprocessing.images import fit_image

USUAL_FACE_BOX = (0.22, 0.12, 0.78, 0.88)
"""Left, top, right, bottom of the head in a usual portrait, as fractions of the image."""

EXAMPLES = """\
examples:
  python -m fantasy_jax.evaluation.video out/demo.mp4
  python -m fantasy_jax.evaluation.video out/demo.mp4 --image=portrait.png --face=0.2,0.1,0.8,0.9
"""


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.evaluation.video",
        description="Measures how well the mouth in a video follows its audio, and how much the face moves.",
        epilog=EXAMPLES,
    )
    parser.add_argument("video", help="mp4 file with audio")
    parser.add_argument("--image", metavar="FILE", help="portrait to compare the first frame with")
    parser.add_argument(
        "--face",
        default=",".join(map(str, USUAL_FACE_BOX)),
        metavar="L,T,R,B",
        help="left, top, right, bottom of the head in the first frame, as fractions (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    check_outputs([arguments.json], [arguments.video, arguments.image])
    video, fps = media.read_video(arguments.video)
    energy = windowed_rms(media.read_audio(arguments.video), len(video), fps)
    box = place_boxes([parse_box(arguments.face, option="--face")], *video.shape[1:3], option="--face")[0]
    face, head = motion(video, box)
    figures = {
        "correlation_with_energy": correlation(mouth_opening(video, box), energy),
        "motion_of_face_in_percent_of_head": face,
        "motion_of_head_in_percent_of_head": head,
    }
    if arguments.image:
        image = fit_image(media.read_image(arguments.image), max(video.shape[1:3]))
        figures["first_frame_psnr"] = psnr(video[0], np.asarray(image))
    for name, value in figures.items():
        print(f"{name.replace('_', ' ') + ' ':.<40} {value:7.3f}")
    if arguments.json:
        with atomic_write(arguments.json) as partial:
            partial.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.evaluation.video")
