"""Timings of PyTorch's Wan transformer in a process of its own, for comparison on the same device.

The model is diffusers' transformer with image conditioning and random weights, without the audio adapter,
with scaled-dot-product attention, eager and compiled by `torch.compile`. The process reads sizes as JSON from
standard input and writes seconds as JSON to standard output.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

from fantasy_jax.errors import ConfigError
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.video import VideoConfig


def time_in_process(model: ModelConfig, video: VideoConfig, repeats: int, warm_up: int) -> dict[str, Any]:
    """Times forward passes for one clip in another process, which has ended when this returns.

    Args:
        model: Sizes and type of the transformer.
        video: Size and length of the clip.
        repeats: Number of timed passes.
        warm_up: Number of passes before them.

    Returns:
        `device`, `dtype` and `torch` (the version); `eager` and `compiled`: seconds of each pass, or one word
        that says why there are none.

    Raises:
        ConfigError: PyTorch or diffusers cannot run the model; the message ends with their last line.
    """
    inputs = ClipInputs.spec(model, video, 1)
    request = {
        "transformer": asdict(model.transformer),
        "dtype": model.dtype,
        "latents": video.latent_shape(1, model.transformer.latent_channels),
        "text": inputs.text.shape,
        "image": inputs.image.shape,
        "repeats": repeats,
        "warm_up": warm_up,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        raise ConfigError(
            f"--against=torch: failed; it needs PyTorch and diffusers (pip install '.[test]'): {reason}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Reads a request and writes the seconds."""
    import torch

    request = json.load(sys.stdin)
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not torch.cuda.is_available()
    device = "cpu" if on_cpu else "cuda"
    dtype = getattr(torch, request["dtype"] if on_cpu else "bfloat16")
    torch.set_default_dtype(dtype)
    with torch.device(device), torch.inference_mode():
        model, inputs = _model(request["transformer"]), _inputs(request)
        found = {"eager": _times(model, inputs, request)}
        if torch._dynamo.config.disable:
            found["compiled"] = "disabled"
        else:
            try:
                found["compiled"] = _times(torch.compile(model), inputs, request)
            except Exception as error:  # no compiler for this device or Python, or one that fails
                found["compiled"] = type(error).__name__
    environment = {"device": device, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    print(json.dumps(environment | found))


def _model(config: dict[str, Any]) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, *config["patch"]),
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["latent_channels"] + config["condition_channels"],
        out_channels=config["latent_channels"],
        text_dim=config["text_dim"],
        freq_dim=config["frequency_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
        eps=config["epsilon"],
        image_dim=config["image_dim"],
        added_kv_proj_dim=config["dim"],
    ).eval()


def _inputs(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    batch, *grid, channels = request["latents"]
    channels += request["transformer"]["condition_channels"]
    return {
        "hidden_states": torch.randn(batch, channels, *grid),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(request["text"]),
        "encoder_hidden_states_image": torch.randn(request["image"]),
        "return_dict": False,
    }


def _times(model: Any, inputs: dict[str, Any], request: dict[str, Any]) -> list[float]:
    import torch

    seconds = []
    for _ in range(request["warm_up"] + request["repeats"]):
        start = time.perf_counter()
        model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[request["warm_up"] :]


if __name__ == "__main__":
    main()
