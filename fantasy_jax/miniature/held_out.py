"""Held-out synthetic clips, generated again from their first frame, prompt and audio or expressions.

Measurements of the miniature compare them with the rendered clips.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from fantasy_jax import cli
from fantasy_jax.config import as_json, section
from fantasy_jax.data.encoded import encode_records
from fantasy_jax.data.records import Record
from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.diffusion.sampler import sample
from fantasy_jax.diffusion.windows import Residuals
from fantasy_jax.errors import ConfigError
from fantasy_jax.evaluation.metrics import correlation
from fantasy_jax.evaluation.mouth import mouth_opening
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.miniature.synthetic import SyntheticConfig, records
from fantasy_jax.models.vae import WanVAE
from fantasy_jax.pipelines.config import PipelineConfig, SampleConfig
from fantasy_jax.pipelines.latents import initial_noise
from fantasy_jax.preprocessing.images import to_uint8
from fantasy_jax.system.encoders import encode_text
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.typing import Array, Float, UInt8
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import store_paths
from fantasy_jax.weights.loading import stored_network, stored_networks

_BATCH_SIZE = 16


@dataclass(frozen=True)
class Figure:
    """A mean over clips.

    Attributes:
        mean: The mean.
        standard_error: Standard error of the mean.
        clips: Number of clips.
    """

    mean: float
    standard_error: float
    clips: int


def figure(values: Sequence[float] | Float[np.ndarray, " N"]) -> Figure:
    """Mean and standard error of one value per clip."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return Figure(float(np.mean(values)), float(error), len(values))


class HeldOutClips:
    """Encoded clips with their ground truth, and the networks that generate them again.

    Attributes:
        networks: The networks.
        video: Size, length and frame rate of the clips.
        config: Sampling settings.
        clips: The records.
        encoded: The encoded clips.
    """

    def __init__(
        self,
        networks: Networks,
        video: VideoConfig,
        config: PipelineConfig,
        clips: Sequence[Record],
        *,
        seed: int = 0,
    ):
        """Encodes the clips.

        Args:
            networks: Networks with trained weights.
            video: Size, length and frame rate of the clips.
            config: Sampling settings.
            clips: Records of `miniature.synthetic`.
            seed: Seed of the initial noise.
        """
        self.networks = networks.keeping("all")
        self.video, self.config, self.clips, self.seed = video, config, clips, seed
        self.encoded = list(encode_records(self.networks, clips))
        self.empty_text = encode_text(self.networks, [""])[0]

    def generate(
        self,
        examples: Sequence[Record],
        description: str,
        *,
        held: HeldLatents | None = None,
        **settings: Any,
    ) -> UInt8[np.ndarray, "N T H W 3"]:
        """Generates the videos of encoded clips.

        Args:
            examples: Encoded clips.
            description: Label of the progress bar.
            held: Latents of all clips that are kept, as arrays of numpy.
            settings: Changes of the sampling settings.
        """
        batches = self.sample(examples, description, replace(self.config, **settings), held=held)
        return np.concatenate([self.decode(latents) for latents in batches])

    def sample(
        self,
        examples: Sequence[Record],
        description: str,
        config: PipelineConfig,
        *,
        held: HeldLatents | None = None,
        residual_callback: Callable[[int, Residuals], None] | None = None,
    ) -> Iterator[Float[Array, "B F h w C"]]:
        """Yields the latents of encoded clips, batch after batch.

        Args:
            examples: Encoded clips.
            description: Label of the progress bar.
            config: Sampling settings.
            held: Latents of all clips that are kept, as arrays of numpy.
            residual_callback: As of `sampler.sample`.
        """
        for i, batch in enumerate(tqdm(batched(examples), desc=description, unit="batch")):
            kept = jax.tree.map(lambda x, first=i * _BATCH_SIZE: jnp.asarray(x[first:][:_BATCH_SIZE]), held)
            inputs = ClipInputs.from_records(batch, self.empty_text)
            if "motion" in inputs.adapters:  # the configured intensities instead of the clip's
                motion = jnp.array([[config.face_motion, config.body_motion]] * len(batch), jnp.float32)
                inputs = replace(inputs, adapters=inputs.adapters | {"motion": motion})
            shape = self.video.latent_shape(len(batch), self.networks.config.vae.latent_channels)
            yield sample(
                self.networks["transformer"],
                initial_noise(self.seed + i, shape),
                inputs,
                config,
                guidance=config.guidance,
                options=config.adapter_options,
                held=kept,
                strength=config.strength if isinstance(config, SampleConfig) else 1.0,
                residual_callback=residual_callback,
            )

    def decode(
        self, latents: Float[Array | np.ndarray, "B F h w C"], dtype: str | None = None
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """Decodes latents to frames, with the VAE in a type (`PipelineConfig.vae_dtype`)."""
        vae = self.networks.with_dtypes(vae=dtype)["vae"]
        return to_uint8(np.asarray(_decode(vae, np.asarray(latents)), np.float32))

    def reconstruct(self, noise: float = 0.0) -> UInt8[np.ndarray, "N T H W 3"]:
        """The VAE's reconstruction of every clip.

        Args:
            noise: Standard deviation of noise added to latents, as a fraction of their root mean square.
        """
        latents = np.stack([clip["latents"] for clip in self.encoded]).astype(np.float32)
        if noise:
            normal = np.random.default_rng(self.seed).standard_normal(latents.shape, np.float32)
            latents += noise * np.sqrt(np.square(latents).mean()) * normal
        starts = range(0, len(latents), _BATCH_SIZE)
        return np.concatenate([self.decode(latents[i : i + _BATCH_SIZE]) for i in starts])

    def correlation_with(
        self, videos: UInt8[np.ndarray, "N T H W 3"], curves: Sequence[Float[np.ndarray, " T"]]
    ) -> Figure:
        """Correlation of the mouth openings measured in videos with one curve per clip."""
        return figure(self.correlations(videos, curves))

    def correlations(
        self,
        videos: Sequence[UInt8[np.ndarray, "T H W 3"]] | UInt8[np.ndarray, "N T H W 3"],
        curves: Sequence[Float[np.ndarray, " T"]],
    ) -> list[float]:
        """The same, clip by clip."""
        boxes = [clip["face_box"].reshape(-1, 4)[0] for clip in self.clips]
        return [
            correlation(mouth_opening(video, box), curve)
            for video, box, curve in zip(videos, boxes, curves, strict=True)
        ]


def batched(examples: Sequence[Record]) -> list[list[Record]]:
    """Splits encoded clips into batches for generation."""
    return [list(examples[i : i + _BATCH_SIZE]) for i in range(0, len(examples), _BATCH_SIZE)]


@nnx.jit
def _decode(vae: WanVAE, latents: Float[Array, "B F h w C"]) -> Float[Array, "B T H W 3"]:
    return vae.decode(latents)


def load_held_out(
    config: ConfigDict, weights: str | Path | None, *, num_clips: int, seed: int = 0
) -> HeldOutClips:
    """Loads the networks, and renders and encodes test clips, as configured.

    Args:
        config: Settings of the miniature.
        weights: Weight store; None: the config's.
        num_clips: Number of test clips.
        seed: Seed of the initial noise.

    Raises:
        ConfigError: A setting is wrong, or no store is named.
        WeightsError: The store does not hold these networks.
    """
    video = section(VideoConfig, config, "video")
    data = section(SyntheticConfig, config, "data")
    sampling = section(SampleConfig, config, "sample")
    networks = load_networks(config, weights, sampling)
    return HeldOutClips(networks, video, sampling, list(records(data, video, "test", num_clips)), seed=seed)


def store_of(config: ConfigDict, weights: str | Path | None) -> str | Path:
    """The weight store of a measurement.

    Args:
        config: Settings of the miniature.
        weights: Weight store; None: the config's.

    Raises:
        ConfigError: There is none.
    """
    if directory := weights or config.get("weights", ""):
        return directory
    raise ConfigError("the config has no weights; name a weight store with --weights")


def load_networks(config: ConfigDict, weights: str | Path | None, sampling: PipelineConfig) -> Networks:
    """Opens the networks of a store, whose sizes must be those of the config.

    Args:
        config: Settings of the miniature.
        weights: Weight store; None: the config's.
        sampling: Sampling settings.

    Raises:
        ConfigError: A setting is wrong, or no store is named.
        WeightsError: The store does not hold these networks.
    """
    model, directory = section(ModelConfig, config, "model"), store_of(config, weights)
    return stored_networks(directory, model, eight_bit_products=sampling.eight_bit_products)


def add_store_arguments(parser: cli.ArgumentParser) -> None:
    """Adds the arguments of every measurement of a store's networks."""
    cli.add_config_argument(parser)
    parser.add_argument("--weights", metavar="DIR", help="weight store (default: `weights` of the config)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def add_arguments(parser: cli.ArgumentParser, *, min_clips: int = 1) -> None:
    """Adds the arguments of every measurement on held-out clips."""
    add_store_arguments(parser)
    parser.add_argument(
        "--clips",
        type=cli.integer(min_clips),
        default=64,
        metavar="N",
        help="number of clips (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=cli.integer(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="seed of the initial noise (default: %(default)s)",
    )


def add_noises_argument(parser: cli.ArgumentParser, *, default: int) -> None:
    """Adds the argument of measurements that repeat each clip."""
    parser.add_argument(
        "--noises",
        type=cli.integer(1),
        default=default,
        metavar="N",
        help="initial noises of each clip (default: %(default)s)",
    )


def check_json(arguments: Namespace, config: ConfigDict, *inputs: str | Path | None) -> None:
    """Checks `--json` before any work; `inputs` are read besides the config and the weights.

    Raises:
        ConfigError: The file is one that is read.
        MediaError: It cannot be written.
    """
    read = cli.config_files(arguments.config, config)
    weights = store_paths(arguments.weights or config.get("weights", ""))
    check_outputs([arguments.json], [*read, *weights, *inputs])


def run_probe(
    parser: cli.ArgumentParser,
    argv: Sequence[str] | None,
    slot: str,
    probe: Callable[[Any, int], Mapping[str, Any]],
    report: Callable[[Any], str],
) -> None:
    """Runs a command that measures one network of a store on pictures of the config's size.

    Args:
        parser: With prog, description and examples; the arguments are added.
        argv: The command line; None: that of the process.
        slot: The network.
        probe: Returns figures, given the network in float32 and the height of pictures in pixels.
        report: Formats them as lines of text.
    """
    add_store_arguments(parser)
    arguments, config = cli.parse(parser, argv)
    check_json(arguments, config)
    network = stored_network(store_of(config, arguments.weights), slot)
    figures = probe(network, section(VideoConfig, config, "video").height)
    print(report(figures))
    if arguments.json:
        write_figures(figures, arguments.json)


def write_figures(figures: Mapping[str, Any], path: str | Path) -> None:
    """Writes figures as JSON."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(as_json(figures), indent=1) + "\n")
