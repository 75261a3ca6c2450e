"""PyTorch's Wan transformer, timed in a process of its own: what the same device does without JAX.

diffusers' module with image conditioning and random weights, without the audio adapter, scaled-dot-product
attention; eager, and compiled by `torch.compile`. Sizes come as JSON on standard input, seconds go as JSON to
standard output.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fantasy_jax.config import ConfigError
from fantasy_jax.pipeline import ModelConfig
from fantasy_jax.typing import Leaf


def time_in_process(
    model: ModelConfig, batch: Mapping[str, Leaf], repeats: int, warm_up: int
) -> dict[str, Any]:
    """Times a forward pass in another process, which has ended when this returns.

    Args:
        model: The transformer's sizes and type.
        batch: Arrays, or abstract ones, with the shapes of `latents`, `text` and `image`.
        repeats: How many passes are timed.
        warm_up: How many before that are not.

    Returns:
        `device`, `dtype` and `torch` (its version); `eager` and `compiled`: seconds of each pass, or in one
        word why there are none.

    Raises:
        ConfigError: PyTorch or diffusers cannot run it; the message is the last line of what they say.
    """
    request = {
        "transformer": asdict(model.transformer),
        "dtype": model.dtype,
        "shapes": {name: batch[name].shape for name in ("latents", "text", "image")},
        "repeats": repeats,
        "warm_up": warm_up,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1][:300]
        raise ConfigError(
            f"--against=torch: {reason} (it takes PyTorch and diffusers: pip install '.[test]')"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Reads sizes, and writes what they took."""
    import torch

    request = json.load(sys.stdin)
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not torch.cuda.is_available()
    device = "cpu" if on_cpu else "cuda"
    dtype = getattr(torch, request["dtype"] if on_cpu else "bfloat16")
    torch.set_default_dtype(dtype)
    with torch.device(device), torch.inference_mode():
        model, inputs = _model(request["transformer"]), _inputs(request["shapes"], request["transformer"])
        found = {"eager": _times(model, inputs, request)}
        if torch._dynamo.config.disable:
            found["compiled"] = "disabled"
        else:
            try:
                found["compiled"] = _times(torch.compile(model), inputs, request)
            except Exception as error:  # no compiler, none for this device or this Python, or one that fails
                found["compiled"] = type(error).__name__
    about = {"device": device, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    print(json.dumps(about | found))


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


def _inputs(shapes: dict[str, list[int]], config: dict[str, Any]) -> dict[str, Any]:
    import torch

    batch, *grid, channels = shapes["latents"]
    return {
        "hidden_states": torch.randn(batch, channels + config["condition_channels"], *grid),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(shapes["text"]),
        "encoder_hidden_states_image": torch.randn(shapes["image"]),
        "return_dict": False,
    }


def _times(model: Any, inputs: dict[str, Any], request: dict[str, Any]) -> list[float]:
    import torch

    seconds = []
    for _ in range(request["warm_up"] + request["repeats"]):
        begun = time.perf_counter()
        model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds[request["warm_up"] :]


if __name__ == "__main__":
    main()
