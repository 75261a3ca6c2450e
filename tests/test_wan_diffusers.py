"""The transformer against diffusers', with weights converted in both directions.

diffusers separates text from image by the number of 512 text tokens. It computes the timestep's sinusoid in
float32, which costs 2.4e-6 of the output: hence the limit 5e-6 for what the timestep reaches, and 2e-6 for
the rest.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY_WAN, abstract, fill, layer, relative, tiny_transformer, to_torch

from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.convert.wan import diffusers_rules, official_rules
from fantasy_jax.models.rope import rotary_table
from fantasy_jax.models.wan import WanTransformer, _patchify

# diffusers and its dependencies announce their own changes.
pytestmark = [
    pytest.mark.usefixtures("highest_precision"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CONFIG = replace(TINY_WAN, text_length=512)
BATCH, FRAMES, ROWS, COLUMNS = 2, 3, 3, 5
LIMIT, LAYER_LIMIT = 5e-6, 2e-6


def make_theirs():
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, *CONFIG.patch),
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.dim // CONFIG.num_heads,
        in_channels=CONFIG.latent_channels + CONFIG.condition_channels,
        out_channels=CONFIG.latent_channels,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.frequency_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=CONFIG.epsilon,
        image_dim=CONFIG.image_dim,
        added_kv_proj_dim=CONFIG.dim,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # no scale stays one and no bias zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def from_diffusers():
    """diffusers' weights in our transformer."""
    theirs = make_theirs()
    return fill(abstract(WanTransformer, CONFIG), diffusers_rules(CONFIG), theirs.state_dict()), theirs


def to_diffusers():
    """Our weights in diffusers' transformer."""
    ours, theirs = tiny_transformer(CONFIG), make_theirs()
    theirs.load_state_dict(to_torch(ours, diffusers_rules(CONFIG)), strict=True)
    return ours, theirs


@pytest.fixture(scope="module", params=[from_diffusers, to_diffusers], ids=["from", "to"])
def pair(request):
    return request.param()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    size = (BATCH, FRAMES, 2 * ROWS, 2 * COLUMNS)
    shapes = {
        "latents": (*size, CONFIG.latent_channels),
        "first_frame": (*size, CONFIG.condition_channels),
        "text": (BATCH, CONFIG.text_length, CONFIG.text_dim),
        "image": (BATCH, 257, CONFIG.image_dim),
    }
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return drawn | {"timestep": np.array([417.5, 12.25], np.float32)}


def run_theirs(model, inputs):
    """The velocity, channels last, and inputs and outputs of every layer."""
    import torch

    seen = {}

    def watch(name):
        def hook(_, arguments, output):
            seen[name] = ([x for x in arguments if torch.is_tensor(x)], output)

        return hook

    named = {"patch": model.patch_embedding, "conditions": model.condition_embedder, "head": model.proj_out}
    named |= {f"block {i}": block for i, block in enumerate(model.blocks)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in named.items()]
    stacked = np.concatenate([inputs["latents"], inputs["first_frame"]], axis=-1)
    hidden = torch.from_numpy(np.ascontiguousarray(np.moveaxis(stacked, -1, 1)))
    with torch.no_grad():
        rest = (torch.from_numpy(inputs[name]) for name in ("timestep", "text", "image"))
        velocity = model(hidden, *rest, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return np.moveaxis(velocity.numpy(), 1, -1), seen


@jax.jit(static_argnums=0)
def run_ours(graphdef, state, inputs):
    model = nnx.merge(graphdef, state)
    conditions = model.conditions(inputs["text"], inputs["image"])
    return model(inputs["latents"], inputs["first_frame"], inputs["timestep"], conditions)


def space_first(tokens):
    """Their `[B, F * S, D]` as our `[B, S, F, D]`."""
    return jnp.asarray(tokens.numpy().reshape(BATCH, FRAMES, ROWS * COLUMNS, -1).swapaxes(1, 2))


def test_velocity(pair, inputs):
    ours, theirs = pair
    assert relative(run_ours(*nnx.split(ours), inputs), run_theirs(theirs, inputs)[0]) < LIMIT


@pytest.mark.slow
def test_layer_by_layer(pair, inputs):
    ours, theirs = pair
    seen = run_theirs(theirs, inputs)[1]

    stacked = jnp.concatenate([inputs["latents"], inputs["first_frame"]], axis=-1)
    tokens = seen["patch"][1].flatten(2).transpose(1, 2)
    assert relative(ours.patch_in(_patchify(stacked, CONFIG.patch)), space_first(tokens)) < LAYER_LIMIT

    time, modulation, text, image = seen["conditions"][1]
    conditions = ours.conditions(jnp.asarray(inputs["text"]), jnp.asarray(inputs["image"]))
    assert relative(conditions["text"].tokens, text) < LAYER_LIMIT
    assert relative(conditions["image"].tokens, image) < LAYER_LIMIT
    sinusoid = theirs.condition_embedder.timesteps_proj(seen["conditions"][0][0]).numpy()
    assert relative(ours.time_out(nnx.silu(ours.time_in(sinusoid))), time) < LAYER_LIMIT
    assert relative(ours.time_modulation(nnx.silu(jnp.asarray(time.numpy()))), modulation) < LAYER_LIMIT

    # Each block and the head takes the input of theirs, so that errors do not accumulate.
    rotary = rotary_table(FRAMES, ROWS, COLUMNS, CONFIG.dim // CONFIG.num_heads)
    parts = jnp.asarray(modulation.numpy()).reshape(BATCH, 6, CONFIG.dim)
    for i in range(CONFIG.num_layers):
        given, expected = seen[f"block {i}"]
        block = layer(ours.blocks, i)
        result = block(space_first(given[0]), parts, rotary, ROWS * COLUMNS, conditions, {})
        assert relative(result, space_first(expected)) < LAYER_LIMIT, i

    last = space_first(seen[f"block {CONFIG.num_layers - 1}"][1])
    shift, scale = jnp.moveaxis(ours.modulation_out + time.numpy()[:, None], 1, 0)[:, :, None, None]
    head = ours.patch_out(ours.norm_out(last) * (1 + scale) + shift)
    assert relative(head, space_first(seen["head"][1])) < LAYER_LIMIT


def test_the_official_and_the_diffusers_table_fill_the_same_parameters():
    ours = tiny_transformer(CONFIG)
    values = flat_parameters(ours)
    tensors = {}
    for rules in (official_rules(CONFIG), diffusers_rules(CONFIG)):
        exported = to_torch(ours, rules)
        filled = flat_parameters(fill(abstract(WanTransformer, CONFIG), rules, exported))
        assert filled.keys() == values.keys()
        assert all(np.array_equal(filled[path], values[path]) for path in values)
        for key, tensor in exported.items():
            tensors.setdefault(key, []).append(tensor)
    # Most keys differ between the two layouts; keys that are equal are of the same tensor.
    shared = {key: pair for key, pair in tensors.items() if len(pair) == 2}
    assert "patch_embedding.weight" in shared
    assert all(np.array_equal(*pair) for key, pair in shared.items())
