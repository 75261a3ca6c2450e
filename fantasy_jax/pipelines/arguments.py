"""Options of the command line that samples clips."""

import argparse

from fantasy_jax import cli
from fantasy_jax.config import NonNegativeFloat, PositiveFloat
from fantasy_jax.preprocessing.face_masks import MASK_MODES

EXAMPLES = """\
examples:
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4
  python sample.py --config=configs/tiny.py --image=portrait.jpg --audio=song.mp3 --prompt="A man sings." \\
      --output=out/song.mp4 --seed=7 --config.sample.num_inference_steps=20
  ten seconds of a recording from its third minute on, of an exact size, with windows that overlap more:
  python sample.py --config=configs/fantasy_talking_14b.py --image=portrait.png --audio=speech.wav \\
      --output=out/ten.mp4 --start=120 --seconds=10 --size=480x832 --config.sample.overlap=7
  several clips with one start; pairs.csv has the columns image, audio, prompt and output:
  python sample.py --config=configs/tiny.py --batch=pairs.csv
  with a motion adapter, a face that hardly moves on a lively body (0.5 is usual):
  python sample.py --config=configs/tiny.py --image=portrait.png --audio=speech.wav --output=out/talk.mp4 \\
      --config.sample.face_motion=0.1 --config.sample.body_motion=0.9
  a picture of two people, of whom the right one speaks; both, each with a sound; a drawing, with boxes:
  python sample.py --config=configs/fantasy_talking_14b.py --image=two.png --audio=a.wav --person=2 \\
      --output=out/right.mp4
  python sample.py --config=configs/fantasy_talking_14b.py --image=two.png --audio=a.wav --audio=b.wav \\
      --output=out/both.mp4
  python sample.py --config=configs/fantasy_talking_14b.py --image=cats.png --audio=a.wav --person=1 \\
      --box=0.1,0.2,0.4,0.6 --box=0.6,0.2,0.9,0.6 --output=out/left.mp4
  a song: the separated voice moves the mouth, and the video plays the whole song:
  python sample.py --config=configs/fantasy_talking_14b.py --image=woman.png --audio=song.mp3 \\
      --voice=vocals.wav --prompt="A woman sings." --output=out/song.mp4
  fewer evaluations, which is an approximation (docs/approximate.md): measure MagCache's curve on a few clips,
  then use it, and gate the guidance:
  python sample.py --config=configs/fantasy_talking_14b.py --batch=pairs.csv --calibrate=out/curve.json
  python sample.py --config=configs/fantasy_talking_14b.py --image=woman.png --audio=woman.wav \\
      --output=out/fast.mp4 --config.sample.magcache.curve=out/curve.json --config.sample.gating.enabled=True

  The 14B model, with weights from `convert_weights.py import --output=weights/fantasy_talking_14b`:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4
  from PyTorch's noise, with the latents saved for comparison:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --image=woman.png --audio=woman.wav --prompt="A woman is talking." --output=out/woman.mp4 \\
      --noise=noise.safetensors --save_latents=out/latents.safetensors
  the video of latents that were saved, or that were kept because the disk was full:
  python sample.py --config=configs/fantasy_talking_14b.py --weights=weights/fantasy_talking_14b \\
      --latents=out/latents.safetensors --audio=woman.wav --output=out/woman.mp4
  four steps in place of thirty, with a LoRA that convert_weights.py download --component=lora fetches:
  python sample.py --config=configs/fantasy_talking_14b.py:fast --image=woman.png --audio=woman.wav \\
      --output=out/fast.mp4
  with previews of the clip, which TAEW2.1 decodes if the store has it (docs/sampling.md):
  python sample.py --config=configs/fantasy_talking_14b.py --image=woman.png --audio=woman.wav \\
      --output=out/woman.mp4 --previews=out/previews
  the same path with small random weights:
  python sample.py --config=configs/fantasy_talking_14b.py:debug --image=woman.png --audio=woman.wav \\
      --output=out/debug.mp4

  the speaker of a video says something else; beside the mp4 a sheet shows source and result:
  python sample.py --config=configs/tiny.py --video=talking.mp4 --audio=speech.wav --output=out/dubbed.mp4
  the second of two people; music and noises of the video, separated from its speech, under the new one:
  python sample.py --config=configs/tiny.py --video=interview.mp4 --audio=speech.wav --person=2 \\
      --background=music.wav --output=out/dubbed.mp4

  FantasyPortrait: two people of a picture, from left to right, each with a driving video:
  python sample.py --config=configs/fantasy_portrait_14b.py --image=two.png --driver=a.mp4 --driver=b.mp4 \\
      --output=out/act.mp4
  one video that shows two people; first see who drives whom:
  python sample.py --config=configs/fantasy_portrait_14b.py --image=two.png --driver=both.mp4 \\
      --overlay=out/overlay.mp4 --output=out/act.mp4
  the right one of two people alone; a drawing, in which no face is found:
  python sample.py --config=configs/fantasy_portrait_14b.py --image=two.png --driver=a.mp4 --person=2 \\
      --output=out/right.mp4
  python sample.py --config=configs/fantasy_portrait_14b.py --image=cats.png --driver=a.mp4 --driver=b.mp4 \\
      --box=0.1,0.2,0.4,0.6 --box=0.6,0.2,0.9,0.6 --output=out/cats.mp4

  memory and time of each network on eight chips, compiled for them on this machine; nothing is sampled:
  python sample.py --config=configs/fantasy_talking_14b.py --compile_only --topology=v6e:2x4 \\
      --config.sample.mesh.context=2 --config.sample.mesh.tensor=4

Every setting of the config file can be given as --config.NAME=VALUE.
"""


def sampling_parser(description: str) -> cli.ArgumentParser:
    """The parser of sample.py, without the options that compile its programs ahead of time.

    Args:
        description: What the command does.
    """
    parser = cli.ArgumentParser(prog="sample.py", description=description, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--image", metavar="FILE", help="the portrait, in any common format")
    parser.add_argument("--prompt", metavar="TEXT", help="what the video shows (default: the pipeline's)")
    parser.add_argument(
        "--output", metavar="FILE", help="the mp4 to write, and beside it a contact sheet (.png)"
    )
    parser.add_argument(
        "--seed",
        type=cli.integer(0, 2**64 - 1),
        metavar="N",
        help="seed of the initial noise, of at most 64 bits (default: 0)",
    )
    parser.add_argument(
        "--start",
        type=cli.number(NonNegativeFloat),
        metavar="SECONDS",
        help="leave out this much of the sounds, or of the driving videos, at the beginning "
        "(--config.sample.start)",
    )
    parser.add_argument(
        "--seconds",
        type=cli.number(PositiveFloat),
        help="use this much of them (--config.sample.max_seconds; default: all)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="also measure the curve of --config.sample.magcache.curve on the clips that are sampled, and "
        "write it to this JSON file",
    )
    _add_previews(parser.add_argument_group("previews"))
    _add_weights(parser.add_argument_group("weights"))
    _add_latents(parser.add_argument_group("latents in files"))
    _add_people(parser.add_argument_group("several people in the picture"))
    _add_talking(parser.add_argument_group("FantasyTalking"))
    _add_dubbing(parser.add_argument_group("Dubbing, with FantasyTalking"))
    _add_portrait(parser.add_argument_group("FantasyPortrait"))
    return parser


def _add_previews(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--previews",
        metavar="DIR",
        help="write what the clip will look like into this folder while it is sampled: an mp4 and a contact "
        "sheet every few steps",
    )
    group.add_argument(
        "--preview_every",
        type=cli.integer(1),
        metavar="N",
        help="steps from one preview to the next (default: a sixth of all)",
    )


def _add_weights(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--weights",
        metavar="DIR",
        help="the store of weights (default: the config's; with '' they are random)",
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA of another program that is added to the transformer, as kohya's trainers, ComfyUI, "
        "LightX2V, peft and diffusers write it; several add up (default: --config.sample.loras)",
    )


def _add_latents(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--noise",
        metavar="FILE",
        help="start from the tensor `noise` in this safetensors file, [1, C, F, h, w], instead of a seed's",
    )
    group.add_argument(
        "--save_latents",
        metavar="FILE",
        help="write the final latents as a safetensors file: the tensor `latents`, with the same layout",
    )
    group.add_argument(
        "--latents",
        metavar="FILE",
        help="decode such latents instead of sampling any; --audio, or --sound of FantasyPortrait, is "
        "played; with --video, the options that say what is dubbed stay the same",
    )


def _add_people(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--person",
        action="append",
        default=[],
        type=cli.integer(0),
        metavar="N",
        help="who speaks a sound, or whom a driver drives, counted from 1, from the left; once for each "
        "--audio or --driver; others keep still",
    )
    group.add_argument(
        "--box",
        action="append",
        default=[],
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="a person's face, as fractions of the picture, where detection fails; once for each person, who "
        "are then counted in this order",
    )
    group.add_argument(
        "--people", type=cli.integer(1, 1024), metavar="N", help="people of the clip, for --compile_only"
    )


def _add_talking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--audio",
        action="append",
        default=[],
        metavar="FILE",
        help="the speech: an audio file, or a video with audio; once for each person who speaks, from left "
        "to right",
    )
    group.add_argument(
        "--voice",
        action="append",
        default=[],
        metavar="FILE",
        help="the separated voice of a sound, without music or noise: it moves the mouth, and --audio is "
        "what the video plays; once for each --audio",
    )
    group.add_argument(
        "--batch",
        metavar="FILE",
        help="a CSV file with the columns image, audio, prompt and output, a clip in each row",
    )


def _add_dubbing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--video",
        metavar="FILE",
        help="a video whose speaker says --audio instead; where a scene shows several people, --person or "
        "--box says who, once for all scenes or once for each, and --person=0 leaves a scene as it is",
    )
    group.add_argument(
        "--mask",
        choices=MASK_MODES,
        help="what is generated: the lower face, the whole face, or with none everything around the face "
        "(default: mouth)",
    )
    group.add_argument(
        "--background", metavar="FILE", help="sound that is mixed with --audio, such as the video's music"
    )


def _add_portrait(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--driver",
        action="append",
        default=[],
        metavar="FILE",
        help="a driving video, or a picture whose expression is held; once for each person, from left to "
        "right, or one video that shows several people",
    )
    group.add_argument(
        "--sound", metavar="FILE", help="the video's sound (default: the first driver's that has any)"
    )
    group.add_argument(
        "--overlay", metavar="FILE", help="write an mp4 that shows who drives whom, before the clip is made"
    )
