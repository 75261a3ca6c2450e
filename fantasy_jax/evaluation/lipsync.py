"""Lip sync on held-out synthetic speakers: does the mouth that is made follow the sound that is heard?

For each clip a video is made from its first frame, its prompt and its sound, and the opening of the mouth
that `mouth.mouth_opening` reads from the pixels is correlated with the opening that spoke the sound:

    python -m fantasy_jax.evaluation.lipsync --config=configs/tiny.py --json=out/lipsync.json
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fantasy_jax import cli
from fantasy_jax.config import build
from fantasy_jax.data.encoded import encode_records
from fantasy_jax.data.records import Record
from fantasy_jax.data.synthetic import SyntheticConfig, records
from fantasy_jax.diffusion.sampler import SamplerInputs, sample
from fantasy_jax.evaluation.mouth import correlation, mouth_opening
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import ModelConfig, Networks, SampleConfig, encode_text, to_uint8
from fantasy_jax.training.talking import sampling_inputs
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.weights import StoredNetworks

EXAMPLE = """\
example:
  python -m fantasy_jax.evaluation.lipsync --config=configs/tiny.py --json=out/lipsync.json
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


def figure(values: Sequence[float]) -> Figure:
    """Mean and standard error."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return Figure(float(np.mean(values)), float(spread), len(values))


def evaluate(
    networks: Networks, config: SampleConfig, clips: Sequence[Record], *, seed: int = 0
) -> dict[str, Figure]:
    """All figures over these clips of synthetic talking heads.

    Args:
        networks: With trained weights.
        config: How videos are made.
        clips: Records of `data.synthetic`, held out.
        seed: Of the starting noise.

    Returns:
        By name: correlation with the truth; of a clip made with another's sound, with its own truth and with
        that other's; without sound; of the renders and of the VAE's reconstruction, the upper bounds; and
        the signal-to-noise ratio outside of the lips, in dB, against the VAE's reconstruction and the render.
    """
    encoded = list(encode_records(networks, clips))
    vae, transformer = networks.vae(), networks.transformer()
    empty_text = encode_text(networks, [""])[0]
    true = np.stack([clip["video"] for clip in clips])
    others = [*range(1, len(clips)), 0]
    swapped = [clip | {"audio": encoded[other]["audio"]} for clip, other in zip(encoded, others, strict=True)]

    def make(examples: list[Record], settings: SampleConfig, name: str) -> UInt8[np.ndarray, "N T H W 3"]:
        parts = range(0, len(examples), _BATCH)
        return np.concatenate(
            [
                _make(
                    transformer,
                    vae,
                    sampling_inputs(examples[i : i + _BATCH], empty_text),
                    settings,
                    seed + i,
                )
                for i in tqdm(parts, desc=name, unit="batch")
            ]
        )

    made = make(encoded, config, "Own sound")
    made_swapped = make(swapped, config, "Another's sound")
    silent = make(encoded, replace(config, audio_scale=1.0, loudness=0.0), "No sound")
    latents = np.stack([clip["latents"] for clip in encoded])
    coded = np.concatenate(
        [_decode(vae, jnp.asarray(latents[i : i + _BATCH])) for i in range(0, len(clips), _BATCH)]
    )

    def follows(videos: UInt8[np.ndarray, "N T H W 3"], whose: Sequence[int] | None = None) -> Figure:
        truths = [clips[i]["opening"] for i in whose] if whose is not None else [c["opening"] for c in clips]
        boxes = [clip["face_box"][0] for clip in clips]
        return figure(
            [
                correlation(mouth_opening(video, box), truth)
                for video, box, truth in zip(videos, boxes, truths, strict=True)
            ]
        )

    lips = np.stack([clip["lips"] for clip in clips])
    return {
        "correlation": follows(made),
        "correlation_with_another_sound": follows(made_swapped),
        "correlation_with_that_sound": follows(made_swapped, others),
        "correlation_without_sound": follows(silent),
        "correlation_of_vae": follows(coded),
        "correlation_of_renders": follows(true),
        "psnr_outside_lips": figure(_psnr_outside(made, coded, lips)),
        "psnr_outside_lips_to_render": figure(_psnr_outside(made, true, lips)),
        "psnr_of_vae": figure(_psnr_outside(coded, true, np.zeros_like(lips))),
    }


def _make(
    transformer: WanTransformer, vae: WanVAE, inputs: SamplerInputs, config: SampleConfig, seed: int
) -> UInt8[np.ndarray, "B T H W 3"]:
    shape = (*inputs.first_frame.shape[:-1], transformer.config.latent_channels)
    noise = jax.random.normal(jax.random.key(seed), shape)
    return _decode(vae, sample(transformer, noise, inputs, config))


def _decode(vae: WanVAE, latents: Float[Array, "B F h w C"]) -> UInt8[np.ndarray, "B T H W 3"]:
    return to_uint8(np.asarray(_decoded(vae, latents)))


@nnx.jit
def _decoded(vae: WanVAE, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
    return vae.decode(latents)


def _psnr_outside(
    videos: UInt8[np.ndarray, "N T H W 3"],
    true: UInt8[np.ndarray, "N T H W 3"],
    lips: UInt8[np.ndarray, "N T H W"],
) -> list[float]:
    """Of each clip, over pixels in which no frame has lips, nor their neighbours."""
    ratios = []
    for video, expected, mask in zip(videos, true, lips, strict=True):
        outside = cv2.dilate(mask.max(axis=0), np.ones((5, 5), np.uint8)) == 0
        error = np.square((video.astype(np.float64) - expected) / 255)[:, outside]
        ratios.append(float(-10 * np.log10(error.mean() + 1e-10)))
    return ratios


def report(figures: dict[str, Figure]) -> str:
    """A line for each figure, for people."""
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
    }
    return "\n".join(
        f"{names[name] + ' ':.<40} {x.mean:7.3f} +- {x.standard_error:.3f}" for name, x in figures.items()
    )


def main(argv: list[str] | None = None) -> None:
    """Measures from the command line."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.evaluation.lipsync",
        description="Measures lip sync on held-out synthetic speakers.",
        epilog=EXAMPLE,
    )
    cli.add_config_argument(parser)
    parser.add_argument("--weights", metavar="DIR", help="the store of weights (default: the config's)")
    parser.add_argument("--clips", type=int, default=64, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    arguments, config = cli.parse(parser, argv)
    model = build(ModelConfig, config.model, "model")
    networks = StoredNetworks(Path(arguments.weights or config.weights), model)
    data = build(SyntheticConfig, config.data, "data")
    clips = list(records(data, "test", arguments.clips))
    figures = evaluate(networks, build(SampleConfig, config.sample, "sample"), clips, seed=arguments.seed)
    print(report(figures))
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(
            json.dumps({name: asdict(x) for name, x in figures.items()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.evaluation.lipsync")
