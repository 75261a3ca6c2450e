"""Lip sync on held-out synthetic speakers: how well the generated mouth follows the audio.

A video is generated from the first frame, prompt and audio of each clip. The mouth opening measured from its
pixels is correlated with the opening that the audio was synthesised with:

    .venv/bin/python -m fantasy_jax.miniature.lip_sync --config=configs/tiny.py --json=out/lipsync.json
"""

import itertools
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from fantasy_jax import cli, media
from fantasy_jax.data.records import Record
from fantasy_jax.errors import MediaError
from fantasy_jax.evaluation.metrics import psnr, windowed_rms
from fantasy_jax.evaluation.mouth import mouth_opening
from fantasy_jax.miniature.held_out import (
    Figure,
    HeldOutClips,
    add_arguments,
    check_json,
    figure,
    load_held_out,
    write_figures,
)
from fantasy_jax.system.encoders import encode_audio
from fantasy_jax.typing import Bool, Float, UInt8
from fantasy_jax.video import SAMPLE_RATE

EXAMPLES = """\
examples:
  with the weights that come with the project:
  python -m fantasy_jax.miniature.lip_sync --config=configs/tiny.py --json=out/lipsync.json

  with other weights:
  python -m fantasy_jax.miniature.lip_sync --config=configs/tiny.py --weights=out/tiny/weights

  also with real speech:
  python -m fantasy_jax.miniature.lip_sync --config=configs/tiny.py --speech=speech.wav
"""

LABELS = {
    "correlation": "mouth opening with ground truth",
    "correlation_with_other_audio": "  other clip's audio, own truth",
    "correlation_with_other_truth": "  other clip's audio, its truth",
    "correlation_without_audio": "  without audio",
    "correlation_of_vae": "  VAE reconstruction",
    "correlation_of_renders": "  rendered clips",
    "psnr_outside_lips": "PSNR outside lips, to VAE (dB)",
    "psnr_outside_lips_to_render": "PSNR outside lips, to render (dB)",
    "psnr_of_vae": "PSNR of VAE to render (dB)",
    "opening_in_pauses": "opening in pauses",
    "opening_in_speech": "  in speech",
    "opening_in_pauses_over_speech": "  in pauses over that in speech",
    "opening_in_pauses_without_audio": "  without audio, in pauses",
    "opening_in_speech_without_audio": "  without audio, in speech",
    "opening_in_pauses_over_speech_without_audio": "  without audio, pauses over speech",
    "opening_in_pauses_of_renders": "  rendered clips, in pauses",
    "opening_in_speech_of_renders": "  rendered clips, in speech",
    "opening_in_pauses_over_speech_of_renders": "  rendered clips, pauses over speech",
    "correlation_of_real_speech": "real speech, opening with energy",
    "correlation_of_real_speech_with_other_audio": "  with energy of other audio",
}


def lip_sync(held_out: HeldOutClips) -> dict[str, Figure]:
    """Measures lip sync and image quality against the ground truth.

    Returns:
        By name: the correlation with the ground truth; of clips generated with another clip's audio, the
        correlation with their own truth and with that of the audio; the correlation without audio; those of
        the VAE's reconstruction and of the rendered clips, which are upper bounds; and PSNR in dB: outside
        the lips to the VAE's reconstruction and to the rendered clip, and of the VAE to the rendered clip;
        and those of `pauses`, of the clips generated with and without audio, and of the rendered ones.
    """
    clips, encoded = held_out.clips, held_out.encoded
    others = [*range(1, len(clips)), 0]
    swapped = [clip | {"audio": encoded[other]["audio"]} for clip, other in zip(encoded, others, strict=True)]
    truths, lips = ([clip[name] for clip in clips] for name in ("opening", "lips"))
    rendered = np.stack([clip["video"] for clip in clips])
    generated = held_out.generate(encoded, "Own audio")
    other_audio = held_out.generate(swapped, "Other audio")
    no_audio = held_out.generate(encoded, "No audio", audio_guidance_scale=1.0, audio_attention_scale=0.0)
    decoded = held_out.reconstruct()
    return {
        "correlation": held_out.correlation_with(generated, truths),
        "correlation_with_other_audio": held_out.correlation_with(other_audio, truths),
        "correlation_with_other_truth": held_out.correlation_with(other_audio, [truths[i] for i in others]),
        "correlation_without_audio": held_out.correlation_with(no_audio, truths),
        "correlation_of_vae": held_out.correlation_with(decoded, truths),
        "correlation_of_renders": held_out.correlation_with(rendered, truths),
        "psnr_outside_lips": figure(_psnr_outside(generated, decoded, lips)),
        "psnr_outside_lips_to_render": figure(_psnr_outside(generated, rendered, lips)),
        "psnr_of_vae": figure(_psnr_outside(decoded, rendered, np.zeros_like(lips))),
        **pauses(held_out.clips, generated, ""),
        **pauses(held_out.clips, no_audio, "_without_audio"),
        **pauses(held_out.clips, rendered, "_of_renders"),
    }


def pauses(clips: Sequence[Record], videos: UInt8[np.ndarray, "N T H W 3"], suffix: str) -> dict[str, Figure]:
    """Measures whether mouths close in pauses of the speech.

    A pause is a run of at least four frames (160 ms) in which the true opening is below 0.05; the closed lips
    of an m or b are shorter. Openings are in units of the truth, from 0 (closed) to 1: measured with the
    pattern that opening leaves in the rendered clip, and scaled as the line of best fit of the rendered
    clip's to the truth. The first frame, which is given, does not count, nor do clips without a pause.

    Args:
        clips: Records of the clips.
        videos: Videos of them, in their order.
        suffix: Of the figures' names.

    Returns:
        The mean opening in pauses, that in the other frames, and the ratio of the two means.
    """
    found = []
    for clip, video in zip(clips, videos, strict=True):
        paused = _pauses(clip["opening"])[1:]
        if paused.any() and not paused.all():
            opening = _absolute_opening(video, clip)[1:]
            found.append((opening[paused].mean(), opening[~paused].mean()))
    quiet, speaking = np.array(found).reshape(-1, 2).T
    return {
        f"opening_in_pauses{suffix}": figure(quiet),
        f"opening_in_speech{suffix}": figure(speaking),
        f"opening_in_pauses_over_speech{suffix}": figure(quiet / speaking.mean()),
    }


def _pauses(opening: Float[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    paused = np.zeros(len(opening), bool)
    for below, frames in itertools.groupby(range(len(opening)), lambda i: opening[i] < 0.05):
        if below and len(run := list(frames)) >= 4:
            paused[run] = True
    return paused


def _absolute_opening(video: UInt8[np.ndarray, "T H W 3"], clip: Record) -> Float[np.ndarray, " T"]:
    """The opening of the mouth in every frame, in units of the clip's true opening."""
    box = clip["face_box"][0]
    slope, offset = np.polyfit(clip["opening"], mouth_opening(clip["video"], box), 1)
    return (mouth_opening(video, box, clip["video"]) - offset) / slope


def lip_sync_with_speech(
    held_out: HeldOutClips, waveform: Float[np.ndarray, " samples"]
) -> dict[str, Figure]:
    """Measures lip sync of the synthetic faces with real speech; each clip gets the next piece of it.

    Args:
        held_out: The clips.
        waveform: Speech at 16 kHz, at least as long as a clip.

    Returns:
        Correlation of the mouth opening with the energy of the given audio, and with that of another clip.

    Raises:
        MediaError: The speech is shorter than a clip.
    """
    video = held_out.video
    length = video.num_samples
    if waveform.size < length:
        raise MediaError(
            f"the speech lasts {waveform.size / SAMPLE_RATE:.2f} s; it must last {length / SAMPLE_RATE:.2f} s"
        )
    count = waveform.size // length
    pieces = [waveform[i % count * length :][:length] for i in range(len(held_out.clips))]
    encoder = held_out.networks["speech_encoder"]
    examples = [
        clip | {"audio": np.asarray(encode_audio(encoder, piece)[0])}
        for clip, piece in zip(held_out.encoded, pieces, strict=True)
    ]
    energies = [windowed_rms(piece, video.num_frames, video.fps) for piece in pieces]
    generated = held_out.generate(examples, "Real speech")
    others = [*energies[1:], energies[0]]
    return {
        "correlation_of_real_speech": held_out.correlation_with(generated, energies),
        "correlation_of_real_speech_with_other_audio": held_out.correlation_with(generated, others),
    }


def _psnr_outside(
    videos: UInt8[np.ndarray, "N T H W 3"],
    references: UInt8[np.ndarray, "N T H W 3"],
    lips: Sequence[UInt8[np.ndarray, "T H W"]] | UInt8[np.ndarray, "N T H W"],
) -> list[float]:
    """PSNR of each clip over the pixels that are at least three pixels from the lips of every frame."""
    outsides = [cv2.dilate(mask.max(axis=0), np.ones((5, 5), np.uint8)) == 0 for mask in lips]
    return [
        psnr(video[:, outside], reference[:, outside])
        for video, reference, outside in zip(videos, references, outsides, strict=True)
    ]


def report(figures: Mapping[str, Figure]) -> str:
    """Formats figures, one per line."""
    labels = {name: LABELS.get(name, name.replace("_", " ")) for name in figures}
    return "\n".join(
        f"{labels[name] + ' ':.<40} {x.mean:7.3f} +- {x.standard_error:.3f}" for name, x in figures.items()
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.miniature.lip_sync",
        description="Measures lip sync on held-out synthetic speakers.",
        epilog=EXAMPLES,
    )
    add_arguments(parser)
    parser.add_argument("--speech", metavar="FILE", help="also measure the synthetic faces with this speech")
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config, arguments.speech)
    speech = media.read_audio(arguments.speech) if arguments.speech else None
    held_out = load_held_out(config, arguments.weights, num_clips=arguments.clips, seed=arguments.seed)
    figures = lip_sync(held_out)
    if speech is not None:
        figures |= lip_sync_with_speech(held_out, speech)
    print(report(figures))
    if arguments.json:
        write_figures(figures, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.miniature.lip_sync")
