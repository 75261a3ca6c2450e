"""Lip sync on held-out synthetic speakers: does the mouth that is made follow the sound that is heard?

For each clip a video is made from its first frame, its prompt and its sound, and the opening of the mouth
that `mouth.mouth_opening` reads from the pixels is correlated with the opening that spoke the sound:

    python -m fantasy_jax.evaluation.lipsync --config=configs/tiny.py --json=out/lipsync.json
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from fantasy_jax import cli, media
from fantasy_jax.config import ConfigError, as_json, build
from fantasy_jax.data.encoded import encode_records
from fantasy_jax.data.records import Record
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.data.synthetic import SyntheticConfig, records
from fantasy_jax.diffusion.sampler import SamplerInputs, sample
from fantasy_jax.evaluation.mouth import correlation, mouth_opening
from fantasy_jax.evaluation.video import psnr, sound_energy
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import ModelConfig, Networks, SampleConfig, encode_text, motion_input, to_uint8
from fantasy_jax.training.talking import sampling_inputs
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.weights import StoredNetworks

EXAMPLE = """\
examples:
  python -m fantasy_jax.evaluation.lipsync --config=configs/tiny.py --json=out/lipsync.json
  python -m fantasy_jax.evaluation.lipsync --config=configs/tiny.py --speech=speech.wav
"""

_BATCH = 16


@dataclass(frozen=True)
class Figure:
    """A mean over clips.

    Attributes:
        mean: Of it.
        standard_error: Of the mean.
        clips: How many.
    """

    mean: float
    standard_error: float
    clips: int


def figure(values: Sequence[float] | Float[np.ndarray, " N"]) -> Figure:
    """Mean and standard error."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return Figure(float(np.mean(values)), float(spread), len(values))


class LipSync:
    """Makes videos of held-out speakers and measures them."""

    def __init__(self, networks: Networks, config: SampleConfig, clips: Sequence[Record], *, seed: int = 0):
        """Encodes the clips.

        Args:
            networks: With trained weights.
            config: How videos are made.
            clips: Records of `data.synthetic`, held out.
            seed: Of the starting noise.
        """
        self.config, self.clips, self.seed, self.networks = config, clips, seed, networks
        self.encoded = list(encode_records(networks, clips))
        self.vae, self.transformer = networks.vae(), networks.transformer()
        self.speech_encoder = networks.speech_encoder()
        self.empty_text = encode_text(networks, [""])[0]

    def figures(self) -> dict[str, Figure]:
        """All that can be told where the truth is known.

        Returns:
            By name: correlation with the truth; of a clip made with another's sound, with its own truth and
            with that other's; without sound; of the renders and of the VAE's reconstruction, the upper
            bounds; and the signal-to-noise ratio outside of the lips, in dB, against the VAE's
            reconstruction and against the render.
        """
        clips, encoded = self.clips, self.encoded
        others = [*range(1, len(clips)), 0]
        swapped = [
            clip | {"audio": encoded[other]["audio"]} for clip, other in zip(encoded, others, strict=True)
        ]
        truths, lips = ([clip[name] for clip in clips] for name in ("opening", "lips"))
        true = np.stack([clip["video"] for clip in clips])
        made = self.make(encoded, "Own sound")
        made_swapped = self.make(swapped, "Another's sound")
        silent = self.make(encoded, "No sound", audio_scale=1.0, loudness=0.0)
        coded = np.concatenate(
            [_decode(self.vae, np.stack([x["latents"] for x in part])) for part in _parts(encoded)]
        )
        return {
            "correlation": self.follows(made, truths),
            "correlation_with_another_sound": self.follows(made_swapped, truths),
            "correlation_with_that_sound": self.follows(made_swapped, [truths[i] for i in others]),
            "correlation_without_sound": self.follows(silent, truths),
            "correlation_of_vae": self.follows(coded, truths),
            "correlation_of_renders": self.follows(true, truths),
            "psnr_outside_lips": figure(_psnr_outside(made, coded, lips)),
            "psnr_outside_lips_to_render": figure(_psnr_outside(made, true, lips)),
            "psnr_of_vae": figure(_psnr_outside(coded, true, np.zeros_like(lips))),
        }

    def figures_of_speech(self, waveform: Float[np.ndarray, " samples"]) -> dict[str, Figure]:
        """Real speech on the synthetic faces: each gets the next piece of it, as long as a clip.

        Args:
            waveform: 16 kHz; at least one clip long.

        Returns:
            Correlation of the opening with the energy of the sound that was given, and with another's.

        Raises:
            MediaError: The speech is too short.
        """
        frames, fps = len(self.clips[0]["video"]), self.config.fps
        length = int(frames / fps * SAMPLE_RATE)
        if waveform.size < length:
            raise media.MediaError(f"the speech lasts {waveform.size / SAMPLE_RATE:.2f} s, less than a clip")
        count = waveform.size // length
        pieces = [waveform[i % count * length :][:length] for i in range(len(self.clips))]
        examples = [
            clip | {"audio": np.asarray(self.speech_encoder(piece)[0])}
            for clip, piece in zip(self.encoded, pieces, strict=True)
        ]
        energies = [sound_energy(piece, frames, fps) for piece in pieces]
        made = self.make(examples, "Real speech")
        return {
            "correlation_of_speech": self.follows(made, energies),
            "correlation_of_speech_with_another": self.follows(made, [*energies[1:], energies[0]]),
        }

    def make(
        self, examples: Sequence[Record], name: str, **settings: float
    ) -> UInt8[np.ndarray, "N T H W 3"]:
        """Videos of encoded clips, with a bar of this name."""
        config = replace(self.config, **settings)
        motion = motion_input(self.networks.config, config)
        videos = []
        for i, part in enumerate(tqdm(_parts(examples), desc=name, unit="batch")):
            inputs = sampling_inputs(part, self.empty_text)
            if motion is not None:  # what is asked for, not what the clip had
                inputs = replace(inputs, motion=jnp.repeat(motion, len(part), axis=0))
            videos.append(_make(self.transformer, self.vae, inputs, config, self.seed + i))
        return np.concatenate(videos)

    def follows(
        self, videos: UInt8[np.ndarray, "N T H W 3"], courses: Sequence[Float[np.ndarray, " T"]]
    ) -> Figure:
        """Correlation of the openings that are seen in videos with these courses."""
        boxes = [clip["face_box"][0] for clip in self.clips]
        return figure(
            [
                correlation(mouth_opening(video, box), course)
                for video, box, course in zip(videos, boxes, courses, strict=True)
            ]
        )


def _parts(examples: Sequence[Record]) -> list[list[Record]]:
    return [list(examples[i : i + _BATCH]) for i in range(0, len(examples), _BATCH)]


def _make(
    transformer: WanTransformer, vae: WanVAE, inputs: SamplerInputs, config: SampleConfig, seed: int
) -> UInt8[np.ndarray, "B T H W 3"]:
    shape = (*inputs.first_frame.shape[:-1], transformer.config.latent_channels)
    noise = jax.random.normal(jax.random.key(seed), shape)
    return _decode(vae, sample(transformer, noise, inputs, config))


def _decode(vae: WanVAE, latents: Float[Array | np.ndarray, "B F h w C"]) -> UInt8[np.ndarray, "B T H W 3"]:
    return to_uint8(np.asarray(_decoded(vae, jnp.asarray(latents))))


@nnx.jit
def _decoded(vae: WanVAE, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
    return vae.decode(latents)


def _psnr_outside(
    videos: UInt8[np.ndarray, "N T H W 3"],
    true: UInt8[np.ndarray, "N T H W 3"],
    lips: Sequence[UInt8[np.ndarray, "T H W"]] | UInt8[np.ndarray, "N T H W"],
) -> list[float]:
    """Of each clip, over pixels in which no frame has lips, nor their neighbours."""
    outsides = [cv2.dilate(mask.max(axis=0), np.ones((5, 5), np.uint8)) == 0 for mask in lips]
    return [
        psnr(video[:, outside], expected[:, outside])
        for video, expected, outside in zip(videos, true, outsides, strict=True)
    ]


def report(figures: Mapping[str, Figure]) -> str:
    """A line for each figure, for people; those without a name here go by their own."""
    names = {
        "correlation": "opening with truth",
        "correlation_with_another_sound": "  made with another's sound",
        "correlation_with_that_sound": "    with that other's truth",
        "correlation_without_sound": "  made without sound",
        "correlation_of_vae": "  VAE's reconstruction",
        "correlation_of_renders": "  renders themselves",
        "psnr_outside_lips": "dB outside lips, to VAE",
        "psnr_outside_lips_to_render": "dB outside lips, to render",
        "psnr_of_vae": "dB of VAE to render",
        "correlation_of_speech": "real speech, opening with energy",
        "correlation_of_speech_with_another": "  with another piece's energy",
    }
    return "\n".join(
        f"{names.get(name, name.replace('_', ' ')) + ' ':.<40} {x.mean:7.3f} +- {x.standard_error:.3f}"
        for name, x in figures.items()
    )


def add_arguments(parser: cli.ArgumentParser) -> None:
    """What every measurement on held-out speakers asks for."""
    cli.add_config_argument(parser)
    parser.add_argument("--weights", metavar="DIR", help="the store of weights (default: the config's)")
    parser.add_argument("--clips", type=int, default=64, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")


def held_out(arguments: Namespace, config: ConfigDict, *, at_least: int = 1) -> LipSync:
    """Held-out speakers and the networks, as `add_arguments` has them.

    Raises:
        ConfigError: Too few clips are asked for, or the config is wrong.
        MediaError: The figures could not be written.
    """
    if arguments.clips < at_least:
        raise ConfigError(
            f"--clips={arguments.clips}: at least {at_least} {'is' if at_least == 1 else 'are'} needed"
        )
    if arguments.json:
        media.check_writable(arguments.json)
    model = build(ModelConfig, config.model, "model")
    networks = StoredNetworks(Path(arguments.weights or config.weights), model)
    clips = list(records(build(SyntheticConfig, config.data, "data"), "test", arguments.clips))
    return LipSync(networks, build(SampleConfig, config.sample, "sample"), clips, seed=arguments.seed)


def write_figures(content: Mapping[str, Any], path: str | None) -> None:
    """Writes figures as JSON, if a file is given."""
    if path:
        with media.whole_or_nothing(path) as partial:
            partial.write_text(json.dumps(as_json(content), indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Measures from the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.evaluation.lipsync",
        description="Measures lip sync on held-out synthetic speakers.",
        epilog=EXAMPLE,
    )
    add_arguments(parser)
    parser.add_argument("--speech", metavar="FILE", help="real speech, to try on the synthetic faces")
    arguments, config = cli.parse(parser, argv)
    speech = media.read_sound(arguments.speech) if arguments.speech else None
    measured = held_out(arguments, config)
    figures = measured.figures()
    if speech is not None:
        figures |= measured.figures_of_speech(speech)
    print(report(figures))
    write_figures(figures, arguments.json)


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.evaluation.lipsync")
