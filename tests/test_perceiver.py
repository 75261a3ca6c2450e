"""The Perceiver resampler against PyTorch, at sizes and lengths that no reference has."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract, disturb, fill, relative

from fantasy_jax.convert.portrait import resampler_rules
from fantasy_jax.models.perceiver import Resampler, ResamplerConfig

pytestmark = pytest.mark.usefixtures("highest_precision")

SMALL = ResamplerConfig(dim=24, depth=3, num_heads=2, head_dim=7, mlp_ratio=3)


@pytest.mark.parametrize(
    ("config", "length", "queries"),
    [
        (SMALL, 1, 4),  # FantasyPortrait's sequences
        (SMALL, 11, 4),  # IP-Adapter's
        (ResamplerConfig(dim=40, depth=1, num_heads=5, head_dim=16, mlp_ratio=2), 5, 1),
    ],
)
def test_parity_with_pytorch(config, length, queries):
    import torch
    from torch_resampler import TorchResampler

    torch.manual_seed(0)
    theirs = disturb(TorchResampler(config, 13, queries, 19))
    x = np.random.default_rng(0).standard_normal((3, length, 13), np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(x)).numpy()
    module = abstract(Resampler, config, 13, queries, 19)
    tensors = {f"x.{key}": value.numpy() for key, value in theirs.state_dict().items()}
    ours = fill(nnx.Dict(x=module), resampler_rules("x", "x", queries, config.dim), tensors)["x"]
    assert ours(jnp.asarray(x)).shape == (3, queries, 19)
    assert relative(ours(jnp.asarray(x)), wanted) < 1e-6
