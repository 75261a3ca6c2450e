"""Key names of ArcFace's IResNet in PyTorch, and a reader of its ONNX exports under these names.

The files of insightface's packages (antelopev2's `glintr100.onnx`, buffalo_l's `w600k_r50.onnx`) are exports
of the PyTorch module, in which norms after convolutions are folded into the convolutions and the tensors have
numbers for names. The names are recovered from the graph. A norm that was folded becomes one that only adds
the bias of the convolution.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fantasy_jax.convert.rules import (
    BATCH_NORM,
    CONV2D,
    Rule,
    Transform,
    affine,
    batch_norm,
    chain,
    permute,
    reshape,
)
from fantasy_jax.models.face_encoder import FaceEncoderConfig

Tensors = dict[str, np.ndarray]
_EPSILON = 1e-5


def official_rules(config: FaceEncoderConfig) -> list[Rule]:
    """Returns the key table of `arcface_torch`'s backbone.pth."""
    rules = [
        Rule("conv1.weight", "conv_in/kernel", CONV2D),
        *batch_norm("bn1", "norm_in"),
        Rule("prelu.weight", "slope_in"),
        *batch_norm("bn2", "norm_out"),
        *affine("fc", "embed", _places(config)),
        *batch_norm("features", "norm_embedding"),
    ]
    for stage in range(len(config.depths)):
        theirs, ours = f"layer{stage + 1}.{{block}}", f"stages/{stage}/{{block}}"
        rules += [
            *(rule for i in (1, 2, 3) for rule in batch_norm(f"{theirs}.bn{i}", f"{ours}/norm{i}")),
            *(Rule(f"{theirs}.conv{i}.weight", f"{ours}/conv{i}/kernel", CONV2D) for i in (1, 2)),
            Rule(f"{theirs}.prelu.weight", f"{ours}/slope"),
            Rule(f"{theirs}.downsample.0.weight", f"{ours}/conv_past/kernel", CONV2D),
            *batch_norm(f"{theirs}.downsample.1", f"{ours}/norm_past"),
        ]
    return rules


def ignored_keys(config: FaceEncoderConfig) -> tuple[str, ...]:
    """Returns the pattern of counters that the network does not use."""
    return ("*num_batches_tracked",)


def _places(config: FaceEncoderConfig) -> Transform:
    """The order of flattened features: channels first in PyTorch, channels last here."""
    size, width = config.feature_size, config.widths[-1]
    apart = (config.embedding, width, size, size)
    return chain(
        reshape((config.embedding, -1), apart),
        chain(permute(2, 3, 1, 0), reshape((size, size, width, config.embedding), (-1, config.embedding))),
    )


@dataclass(eq=False)
class _Layer:
    """A node of the graph that has weights, or the addition at the end of a block."""

    kind: str
    weights: list[np.ndarray]
    stride: int = 1
    norm: list[np.ndarray] | None = None


def onnx_tensors(path: Path) -> Tensors:
    """Reads an IResNet's tensors from its ONNX graph, under `arcface_torch`'s names.

    Raises:
        ModuleNotFoundError: The package `onnx` is missing.
        ValueError: The graph is not an IResNet's.
    """
    layers = _layers(path)
    sums = [i for i, layer in enumerate(layers) if layer.kind == "Add"]
    stem, end = layers[:2], layers[sums[-1] + 1 :] if sums else []
    _expect(stem, ["Conv", "PRelu"])
    _expect(end, ["BatchNormalization", "Gemm"])
    tensors = {
        **_conv(stem[0], "conv1", "bn1"),
        "prelu.weight": stem[1].weights[0].reshape(-1),
        **_norm_tensors(end[0].weights, "bn2"),
        "fc.weight": end[1].weights[0],
        "fc.bias": end[1].weights[1],
        **_norm_tensors(end[1].norm or _no_norm(len(end[1].weights[1])), "features"),
    }
    stage = number = 0
    for begin, stop in pairwise([1, *sums]):
        block = layers[begin + 1 : stop]
        past = [x for x in block if x.kind == "Conv" and x.weights[0].shape[-1] == 1]
        stage, number = (stage + 1, 0) if past else (stage, number + 1)
        tensors |= _block([x for x in block if x not in past], past, f"layer{stage}.{number}")
    return tensors


def _layers(path: Path) -> list[_Layer]:
    """Returns the layers in order; a norm after a convolution or a linear layer is part of it."""
    import onnx

    graph = onnx.load(path).graph
    values = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    layers: list[_Layer] = []
    makers: dict[str, _Layer] = {}
    for node in graph.node:
        attributes = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
        kind, given = node.op_type, node.input[0] if node.input else ""
        # Equal tensors are stored once, and slopes have additional axes for rows and columns.
        if kind in ("Identity", "Unsqueeze") and given in values:
            values[node.output[0]] = values[given]
        elif kind in ("Conv", "PRelu", "BatchNormalization", "Gemm", "Add"):
            weights = [values[name] for name in node.input[1:] if name in values]
            if abs(attributes.get("epsilon", _EPSILON) - _EPSILON) > 1e-9:
                raise ValueError(
                    f"the epsilon of its norms ({attributes['epsilon']:.1e}) must be {_EPSILON:.1e}"
                )
            maker = makers.get(given)
            if kind == "BatchNormalization" and maker and maker.kind in ("Conv", "Gemm"):
                maker.norm = weights
                continue
            if kind == "Gemm" and not attributes.get("transB", 0):
                weights[0] = weights[0].T
            layers.append(_Layer(kind, weights, attributes.get("strides", [1])[0]))
            makers[node.output[0]] = layers[-1]
        elif kind not in ("Identity", "Constant", "Flatten", "Reshape", "Dropout"):
            raise ValueError(f"has a node {kind}, which is not part of an IResNet")
    return layers


def _block(layers: list[_Layer], past: list[_Layer], prefix: str) -> Tensors:
    _expect(layers, ["BatchNormalization", "Conv", "PRelu", "Conv"])
    norm, conv1, prelu, conv2 = layers
    tensors = {
        **_norm_tensors(norm.weights, f"{prefix}.bn1"),
        **_conv(conv1, f"{prefix}.conv1", f"{prefix}.bn2"),
        f"{prefix}.prelu.weight": prelu.weights[0].reshape(-1),
        **_conv(conv2, f"{prefix}.conv2", f"{prefix}.bn3", 1 + len(past)),
    }
    for layer in past:
        tensors |= _conv(layer, f"{prefix}.downsample.0", f"{prefix}.downsample.1", 2)
    return tensors


def _expect(layers: list[_Layer], kinds: list[str]) -> None:
    if (found := [layer.kind for layer in layers]) != kinds:
        raise ValueError(
            f"has the nodes {', '.join(found) or 'none'} where an IResNet has {', '.join(kinds)}"
        )


def _conv(layer: _Layer, name: str, norm: str, stride: int = 1) -> Tensors:
    """Tensors of a convolution and of the norm after it, which may be folded into the convolution's bias."""
    if layer.stride != stride:
        raise ValueError(f"{name} has stride {layer.stride}, not {stride}")
    kernel, *bias = layer.weights
    if bias and layer.norm:
        raise ValueError(f"{name} has both a bias and a norm")
    return {
        f"{name}.weight": kernel,
        **_norm_tensors(layer.norm or _no_norm(len(kernel), *bias), norm),
    }


def _no_norm(width: int, bias: np.ndarray | None = None) -> list[np.ndarray]:
    """Parameters of a norm that only adds a bias."""
    zeros, ones = np.zeros(width, np.float32), np.ones(width, np.float32)
    return [ones, zeros if bias is None else bias, zeros, ones - np.float32(_EPSILON)]


def _norm_tensors(values: list[np.ndarray], name: str) -> Tensors:
    return {f"{name}.{part}": value for part, value in zip(BATCH_NORM, values, strict=True)}
