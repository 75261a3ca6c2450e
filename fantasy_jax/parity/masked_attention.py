"""The runner of the reference of one block's cross-attention, with labels of several people."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.convert import portrait, wan
from fantasy_jax.convert.rules import assign, check, flat_parameters, load, make_plan
from fantasy_jax.models.adapters.expression import ExpressionAdapterConfig
from fantasy_jax.models.condition import Condition, KVProjection, zero_init_kv_layers
from fantasy_jax.models.layers import abstract, stack_layers
from fantasy_jax.models.wan import CrossAttention, WanConfig
from fantasy_jax.parity.reference import Outputs, Reference
from fantasy_jax.preprocessing.people import (
    box_growth,
    grow_box,
    paint_labels,
    reading_order,
    token_labels,
)
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.typing import Array, Int
from fantasy_jax.video import latent_frames


class _Block(nnx.Module):
    """The cross-attention of a block."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        """Builds it in float32."""
        self.cross_attention = CrossAttention(config, rngs=rngs, dtype=jnp.float32, param_dtype=jnp.float32)


class _Blocks(nnx.Module):
    """The cross-attention of one block, with an adapter's keys and values."""

    def __init__(self, config: WanConfig, token_width: int, *, rngs: nnx.Rngs):
        """Builds the block as a stack of one, as key tables have it."""
        self.blocks = stack_layers(lambda rngs: _Block(config, rngs=rngs), 1, rngs=rngs)
        types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        self.layers = zero_init_kv_layers(token_width, config.dim, config.num_heads, 1, **types)


def run_masked_attention(reference: Reference) -> Outputs:
    """Text, image and expression summed, with masks made from boxes."""
    attention, projection = _load(reference)
    tokens = reference.array("input.video_tokens")
    context, windows = (reference.array(f"input.{x}") for x in ("context", "motion_windows"))
    num_latents = latent_frames(reference.config["num_frames"])
    x = tokens.reshape(len(tokens), num_latents, -1, tokens.shape[-1]).swapaxes(1, 2)
    images = reference.config["image_tokens"]
    base = {"image": Condition(context[:, :images]), "text": Condition(context[:, images:])}

    attend = nnx.jit(lambda attention, *arguments: attention(*arguments))

    def attended(people: int, mask: Array | None = None, scale: float = 1.0) -> Array:
        expression = Condition(windows[None, :people], scale=scale, mask=mask)
        result = attend(attention, x, base | {"expression": expression}, {"expression": projection})
        return result.swapaxes(1, 2).reshape(tokens.shape)

    yield "attended_1", attended(1)
    yield "attended_1_scale_0", attended(1, scale=0.0)
    masks = {}
    for people in (2, 3):
        boxes = {}
        for name, value in _boxes(reference, people):
            boxes[name] = value
            yield f"{name}_{people}", value
        width, height = reference.config["picture_size"]
        labels = token_labels(paint_labels(boxes["grown_boxes"], height, width), num_latents)
        yield f"token_labels_{people}", labels
        masks[people] = _mask(labels, windows[:people])
        each = np.repeat(np.asarray(masks[people])[0].swapaxes(0, 1), windows.shape[-2], axis=-1)
        yield f"mask_{people}", each.astype(np.uint8)
    yield "attended_2", attended(2, masks[2])
    yield "attended_2_scale_0.5", attended(2, masks[2], 0.5)
    yield "attended_3", attended(3, masks[3])


def _load(reference: Reference) -> tuple[CrossAttention, KVProjection]:
    """The block's cross-attention and the adapter's projections, with the reference's weights."""
    sizes = reference.config
    config = WanConfig(dim=sizes["dim"], num_heads=sizes["num_heads"], num_layers=1, epsilon=sizes["eps"])
    rules = [rule for rule in wan.official_rules(config) if ".cross_attn." in rule.source]
    adapter = portrait.official_rules(
        ExpressionAdapterConfig(), processor="blocks.{layer}.cross_attn.processor"
    )
    rules += [rule for rule in adapter if rule.target.startswith("layers/")]
    module = abstract(lambda rngs: _Blocks(config, sizes["context_dim"], rngs=rngs))
    plan = make_plan(rules, reference.weights.specs, flat_parameters(module))
    assign(module, load(check(plan, reference.folder), reference.weights.read))
    first = partial(jax.tree.map, lambda x: x[0])
    blocks, layers = (
        nnx.merge(graphdef, first(state))
        for graphdef, state in map(nnx.split, (module.blocks, module.layers))
    )
    return blocks.cross_attention, layers


def _boxes(reference: Reference, people: int) -> Iterator[tuple[str, Int[np.ndarray, "..."]]]:
    """The order of the faces, and their boxes from left to right, grown as the drivers move."""
    found = np.asarray(reference.array(f"input.detector_boxes_{people}"), np.float64)
    order = reading_order(found)
    yield "face_order", np.array(order)
    width, height = reference.config["picture_size"]
    growth = [box_growth(np.asarray(x, np.float64)) for x in reference.array(f"input.driver_boxes_{people}")]
    grown = [grow_box(found[i], x, height, width) for i, x in zip(order, growth, strict=True)]
    yield "grown_boxes", np.stack(grown)


def _mask(labels: Int[np.ndarray, "F S"], windows: Array) -> Array:
    inputs = ClipInputs(
        None, None, None, None, adapters={"expression": windows[None]}, labels=jnp.asarray(labels[None])
    )
    return inputs.attended_people("expression")
