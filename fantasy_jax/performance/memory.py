"""Which settings of sampling fit which GPU, for a size and a length of video.

One network is in memory at a time (`sample.keep` is `none`), so that the peak is that of the stage that needs
most: its weights and other arguments, which are counted exactly, and its temporaries. These come from XLA,
which compiles for the attached device with `--compile_only`, or else from an account of the largest arrays
that are in memory together (`account`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import jax

from fantasy_jax import cli
from fantasy_jax.config import PositiveFloat, section
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.models.eight_bit import EightBit
from fantasy_jax.models.tiling import split_tiles
from fantasy_jax.performance.ahead import exceeding_temporaries, slice_devices, with_size
from fantasy_jax.performance.chips import GIB
from fantasy_jax.performance.program import Program, device_bytes
from fantasy_jax.performance.programs import sampling_programs
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.pipelines.tasks import pipeline_of
from fantasy_jax.sharding import MeshConfig, WeightsMemory, make_mesh
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.vae_memory import temporary_bytes
from fantasy_jax.video import VideoConfig

EXAMPLES = """\
examples:
  python -m fantasy_jax.performance.memory --config=configs/fantasy_talking_14b.py --size=480x640 --seconds=5
  temporaries by the compiler of the attached GPU, or of a TPU that need not be attached:
  python -m fantasy_jax.performance.memory --config=configs/fantasy_talking_14b.py --compile_only
  python -m fantasy_jax.performance.memory --config=configs/fantasy_talking_14b.py --compile_only \\
      --topology=v5p:2x2x1
"""

GPUS = {24: 24564, 32: 32607, 48: 46068, 80: 81559, 141: 143771}
"""MiB that `nvidia-smi` shows, by the gigabytes of the name: RTX 4090, RTX 5090, L40S, H100, H200."""
RESERVE = GIB
"""Left to CUDA's context, cuBLAS and cuDNN."""


@dataclass(frozen=True)
class Choice:
    """Settings whose memory is compared.

    Attributes:
        name: For the table.
        eight_bit: Type of 8-bit weights (`convert_weights.py quantize`); None: 16 bits.
        weights_memory: As of `PipelineConfig`.
    """

    name: str
    eight_bit: EightBit | None = None
    weights_memory: WeightsMemory = "device"


CHOICES = (
    Choice("weights of 16 bits"),
    Choice("weights of 8 bits", "int8"),
    Choice("weights of 16 bits in the host's memory", None, "host"),
    Choice("weights of 8 bits in the host's memory", "int8", "host"),
)


@dataclass(frozen=True)
class Stage:
    """What a program needs.

    Attributes:
        name: Name of the program.
        arguments: Bytes of weights and inputs on the device, and of results that do not reuse their memory.
        temporaries: Bytes of everything else on it.
        host: Bytes of weights in the host's memory.
    """

    name: str
    arguments: int
    temporaries: int
    host: int

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return self.arguments + self.temporaries


def stages(
    choice: Choice,
    model: ModelConfig,
    config: PipelineConfig,
    video: VideoConfig,
    *,
    device: jax.Device | None = None,
) -> list[Stage]:
    """What each program of sampling needs on one device.

    Args:
        choice: Type and place of the weights.
        model: All sizes.
        config: Settings of sampling; a clip of `max_seconds` consists of windows.
        video: Size and length of a window.
        device: Device whose compiler gives the temporaries; None: they are accounted for.
    """
    config = replace(
        config,
        mesh=MeshConfig(fsdp=1),
        weights_memory=choice.weights_memory,
        eight_bit_products=config.eight_bit_products and choice.eight_bit is not None,
    )
    mesh = make_mesh(devices=[device or jax.devices()[0]])
    found = []
    with jax.set_mesh(mesh):
        for program in sampling_programs(model, config, video, mesh, eight_bit=choice.eight_bit):
            lowered = program.lower()
            arguments = device_bytes(program.arguments) + _new_results(lowered)
            arguments += _other_tiles(program, config, video)
            if device is None:
                temporaries = account(program, model, config, video)
            else:
                temporaries = _compiled_temporaries(program, lowered)
            host = device_bytes(program.arguments, in_host=True)
            found.append(Stage(program.name, arguments, temporaries, host))
    return found


def account(program: Program, model: ModelConfig, config: PipelineConfig, video: VideoConfig) -> int:
    """Temporaries by the largest arrays that are in memory together, in bytes; others are neglected.

    - Of the transformer's step: of one block, the residual stream before and after in float32, its norm, and
      the hidden units of the MLP before and after the activation, in the type of products (attention needs
      less); two kernels in that type, if weights have 8 bits; two blocks that were copied from the host.
      On an H100 XLA needed 2.4 GiB for 24,000 tokens, for which this is 2.4.
    - Of the conditions: a quarter of what they are, their keys and values. For a v5p XLA needed 0.31 GiB for
      1.28.
    - Of the VAE: by the account from which it takes what it does at once (`vae_memory.temporary_bytes`).
    - Of encoders of text, images and sound, which take short inputs: as much as a tenth of their weights.
    """
    itemsize = 2 if model.dtype == "bfloat16" else 4
    leaves = jax.tree.leaves(program.arguments)
    if program.name.startswith("guided step"):
        sizes = model.transformer
        tokens = video.latent_frames * video.tokens_per_frame * config.windows_per_device
        tokens *= len(config.guidance) if config.batch_branches else 1
        block = tokens * (8 * sizes.dim + itemsize * (sizes.dim + 2 * sizes.ffn_dim))
        has_eight_bit = any(leaf.dtype.itemsize == 1 for leaf in leaves)
        kernels = 2 * itemsize * sizes.dim * sizes.ffn_dim * has_eight_bit
        streamed = 2 * device_bytes(leaves, in_host=True) // sizes.num_layers
        return block + kernels + streamed
    if program.name == "conditions":
        return device_bytes(jax.eval_shape(program.call, *program.arguments)) // 4
    if "latent" in program.name:
        sides = video.latent_size
        if program.name.startswith("a tile"):
            sides = tuple(map(min, sides, config.tile))
        return temporary_bytes(model.vae, config.vae_dtype or model.dtype, sides)
    return device_bytes(leaves) // 10


def _compiled_temporaries(program: Program, lowered: jax.stages.Lowered) -> int:
    """Temporaries by the compiler, even if the program does not fit its device."""
    try:
        return lowered.compile().memory_analysis().temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        return exceeding_temporaries(error, device_bytes(program.arguments))


def _new_results(lowered: jax.stages.Lowered) -> int:
    """Bytes of the results that do not take the place of donated arguments."""
    donated = [leaf for leaf in jax.tree.leaves(lowered.args_info) if leaf.donated]
    return max(device_bytes(lowered.out_info) - device_bytes(donated), 0)


def _other_tiles(program: Program, config: PipelineConfig, video: VideoConfig) -> int:
    """Bytes of the causal caches of the tiles that are not being decoded, at most."""
    if not program.name.startswith("a tile"):
        return 0
    _, carried, _ = program.arguments
    tiles = split_tiles(video.latent_size, config.tile, config.tile_stride, 1)
    return (len(tiles) - 1) * device_bytes(carried)


def stage_table(needed: dict[str, Sequence[Stage]]) -> str:
    """The table of stages by the name of the settings: what they need, and which GPUs have it."""
    gpus = {f"{size} GB": mebibytes * 2**20 for size, mebibytes in GPUS.items()}
    numbers = ("step: weights + temporaries", "largest other stage", "peak", "in the host")
    rows = []
    for name, found in needed.items():
        steps = [stage for stage in found if stage.name.startswith("guided step")]
        step = max(steps, key=lambda stage: stage.peak)
        other = max((stage for stage in found if stage not in steps), key=lambda stage: stage.peak)
        peak = max(step.peak, other.peak)
        cells = [name, f"{step.arguments / GIB:.1f} + {step.temporaries / GIB:.1f}"]
        cells += [f"{other.peak / GIB:.1f}, {other.name}", f"{peak / GIB:.1f}", f"{step.host / GIB:.1f}"]
        rows.append(cells + ["yes" if peak + RESERVE <= memory else "no" for memory in gpus.values()])
    return cli.markdown_table(("settings", *numbers, *gpus), rows, numbers=numbers)


def main(argv: list[str] | None = None) -> int:
    """Prints the table for a config."""
    parser = cli.ArgumentParser(
        prog="python -m fantasy_jax.performance.memory", description=__doc__, epilog=EXAMPLES
    )
    cli.add_config_argument(parser)
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels, multiples of 16")
    parser.add_argument("--seconds", type=cli.number(PositiveFloat), metavar="S", help="length of the video")
    parser.add_argument(
        "--compile_only", action="store_true", help="temporaries by the compiler of the attached device"
    )
    parser.add_argument("--topology", metavar="NAME", help="compile for a TPU instead, such as v5p:2x2x1")
    parser.add_argument("--json", metavar="FILE", help="also write all stages to this file")
    arguments, config = cli.parse(parser, argv)
    if arguments.topology and not arguments.compile_only:
        raise ConfigError("--topology has no effect without --compile_only")
    check_outputs([arguments.json], cli.config_files(arguments.config, config))
    settings = section(pipeline_of(config).config_type, config, "sample")
    if arguments.seconds is not None:
        settings = replace(settings, max_seconds=arguments.seconds)
    model, video = section(ModelConfig, config, "model"), section(VideoConfig, config, "video")
    video, device = with_size(video, arguments.size), None
    if arguments.compile_only:
        device = slice_devices(arguments.topology)[0] if arguments.topology else jax.devices()[0]
    needed = {}
    for choice in CHOICES:
        with cli.timed(choice.name):
            needed[choice.name] = stages(choice, model, settings, video, device=device)
    print(f"GiB for {video.height} x {video.width}; {RESERVE / GIB:g} GiB of each GPU is left to CUDA.")
    print(stage_table(needed))
    if arguments.json:
        rows = {name: [asdict(stage) for stage in found] for name, found in needed.items()}
        with atomic_write(arguments.json) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main, "python -m fantasy_jax.performance.memory")
