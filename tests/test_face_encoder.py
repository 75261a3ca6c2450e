"""ArcFace against PyTorch and onnxruntime, with random weights, and its file formats."""

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import abstract, fill, relative, run_convert_weights

from fantasy_jax.convert import arcface as table
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import export, export_entries, flat_parameters
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.models.face_encoder import IRESNET50, FaceEncoder, FaceEncoderConfig
from fantasy_jax.weights.detect import detect
from fantasy_jax.weights.loading import load_network

pytestmark = pytest.mark.usefixtures("highest_precision")

TINY = FaceEncoderConfig(depths=(2, 1, 3, 1), widths=(4, 6, 8, 10), embedding=12, image_size=32)


def torch_iresnet(config):
    """The official module, rewritten with its names; parameters and statistics are random."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels, width, stride):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.prelu = nn.PReLU(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.bn3 = nn.BatchNorm2d(width)
            self.downsample = None
            if stride > 1:
                past = nn.Conv2d(channels, width, 1, stride, bias=False)
                self.downsample = nn.Sequential(past, nn.BatchNorm2d(width))

        def forward(self, x):
            past = x if self.downsample is None else self.downsample(x)
            return past + self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))

    class IResNet(nn.Module):
        def __init__(self):
            super().__init__()
            channels = config.widths[0]
            self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.prelu = nn.PReLU(channels)
            for number, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), 1):
                blocks = [Block(channels, width, 2), *(Block(width, width, 1) for _ in range(depth - 1))]
                self.add_module(f"layer{number}", nn.Sequential(*blocks))
                channels = width
            self.bn2 = nn.BatchNorm2d(channels)
            self.fc = nn.Linear(channels * config.feature_size**2, config.embedding)
            self.features = nn.BatchNorm1d(config.embedding)

        def features_of(self, x):
            x = self.prelu(self.bn1(self.conv1(x)))
            return self.bn2(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

        def forward(self, x):
            return self.features(self.fc(torch.flatten(self.features_of(x), 1)))

    torch.manual_seed(0)
    model = IResNet().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
    return model


@pytest.fixture(scope="module")
def official():
    return torch_iresnet(TINY)


@pytest.fixture(scope="module")
def faces():
    """Pixels `[2, 32, 32, 3]`."""
    return np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)


def by_torch(model, faces):
    """Embeddings and features of PyTorch."""
    import torch

    with torch.no_grad():
        pixels = torch.from_numpy(faces.transpose(0, 3, 1, 2).copy())
        features = model.features_of(pixels).numpy().transpose(0, 2, 3, 1)
        return model(pixels).numpy(), features.reshape(len(faces), -1, features.shape[-1])


def ours(model):
    """Our module with PyTorch's weights."""
    encoder = abstract(FaceEncoder, TINY)
    return fill(encoder, table.official_rules(TINY), model.state_dict(), table.ignored_keys(TINY))


encode = nnx.jit(lambda model, pixels: model(pixels))


def onnx_file(model, path, **options):
    """Exports as insightface does: norms after convolutions are fused into them, names become numbers."""
    import torch

    pixels = torch.zeros(1, 3, TINY.image_size, TINY.image_size)
    names = {"input_names": ["input.1"], "dynamic_axes": {"input.1": {0: "batch"}}}
    with warnings.catch_warnings():  # the newer exporter of PyTorch fuses nothing
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(model, (pixels,), path, dynamo=False, opset_version=11, **names, **options)
    path.with_name("config.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    return path


@pytest.fixture(scope="module")
def graph(official, tmp_path_factory):
    return onnx_file(official, tmp_path_factory.mktemp("onnx") / "w600k_r50.onnx")


def test_parity_with_pytorch(official, faces):
    embedding, features = by_torch(official, faces)
    result = encode(ours(official), jnp.asarray(faces))
    assert relative(result[0], embedding) < 2e-6
    assert relative(result[1], features) < 2e-6
    assert result[1].shape == (2, 4, 10)


def test_parity_with_onnxruntime(official, graph, faces):
    import onnx
    import onnxruntime

    kinds = [node.op_type for node in onnx.load(graph).graph.node]
    assert kinds.count("BatchNormalization") == sum(TINY.depths) + 2  # the others are fused
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (embedding,) = session.run(None, {"input.1": faces.transpose(0, 3, 1, 2)})
    (found,) = detect(open_weights(graph))
    result = encode(found.load(), jnp.asarray(faces))
    assert relative(result[0], embedding) < 2e-6
    assert relative(result[1], by_torch(official, faces)[1]) < 2e-6


def test_onnx_file_without_fused_norms(tmp_path):
    """Two of its tensors are equal; the exporter stores them once."""
    import torch

    model = torch_iresnet(TINY)
    block = model.layer1[1]
    block.bn1.load_state_dict(block.bn3.state_dict())
    preserve = torch.onnx.TrainingMode.PRESERVE
    path = onnx_file(model, tmp_path / "plain.onnx", training=preserve, do_constant_folding=False)
    (found,) = detect(open_weights(path))
    for key, value in export(found.rules, flat_parameters(found.load())):
        np.testing.assert_array_equal(value, model.state_dict()[key].numpy(), err_msg=key)


def test_export_round_trip(official):
    wanted = {k: v for k, v in official.state_dict().items() if not k.endswith("num_batches_tracked")}
    exported = dict(export(table.official_rules(TINY), flat_parameters(ours(official))))
    assert exported.keys() == wanted.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, wanted[key].numpy(), err_msg=key)


def _subtract(graph):
    """Normalisation of pixels, as in exports of MXNet."""
    import onnx

    graph.node.insert(0, onnx.helper.make_node("Sub", ["input.1", "mean"], ["centred"]))


def _stride(graph):
    conv = next(node for node in graph.node if node.op_type == "Conv")
    next(x for x in conv.attribute if x.name == "strides").ints[:] = [2, 2]


def _epsilon(graph):
    norm = next(node for node in graph.node if node.op_type == "BatchNormalization")
    next(x for x in norm.attribute if x.name == "epsilon").f = 2e-5


def _no_prelu(graph):
    graph.node.remove([node for node in graph.node if node.op_type == "PRelu"][2])


def _nothing(graph):
    del graph.node[:]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_subtract, "Sub"),
        (_stride, "stride"),
        (_epsilon, "2.0e-05"),
        (_no_prelu, "BatchNormalization"),
        (_nothing, "PRelu"),
    ],
)
def test_another_graph_is_an_error(graph, tmp_path, change, word):
    import onnx

    model = onnx.load(graph)
    change(model.graph)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(WeightsError, match=f"other.onnx: .*{word}"):
        open_weights(tmp_path / "other.onnx")


def test_a_damaged_onnx_file_is_an_error(graph, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(graph.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"cut\.onnx"):
        open_weights(path)


@pytest.mark.parametrize("kind", ["onnx", "pth"])
def test_the_command_imports_both_kinds_of_files(official, graph, tmp_path, capsys, kind):
    import torch

    path = tmp_path / f"face.{kind}"
    shutil.copy(graph, path) if kind == "onnx" else torch.save(official.state_dict(), path)
    shutil.copy(graph.with_name("config.json"), tmp_path)
    code, out, _ = run_convert_weights(capsys, "import", "--arcface", path, "--output", tmp_path / "store")
    assert code == 0
    assert "float32" in out  # whatever the type of the other networks
    stored = flat_parameters(load_network(tmp_path / "store/face_encoder", TINY, dtype=jnp.float32))
    for place, value in flat_parameters(detect(open_weights(path))[0].load()).items():
        np.testing.assert_array_equal(stored[place], value, err_msg=place)


@pytest.mark.parametrize(
    ("preset", "config", "million"),
    [
        ("iresnet50", IRESNET50, 43.6),
        pytest.param("iresnet100", FaceEncoderConfig(), 65.2, marks=pytest.mark.slow),
    ],
)
def test_full_sizes_are_detected(tmp_path, preset, config, million):
    encoder = abstract(FaceEncoder, config)
    entries = export_entries(table.official_rules(config), flat_parameters(encoder))
    whole = {path: np.broadcast_to(np.int8(0), x.shape) for path, x in flat_parameters(encoder).items()}
    shapes = {x.key: list(x.transform.inverse(x.place(whole[x.path])).shape) for x in entries}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"tensors": shapes}))
    (found,) = detect(open_weights(path))
    assert (found.preset, found.config) == (preset, config)
    assert not found.plan()[1].problems
    count = sum(x.size for x in jax.tree.leaves(nnx.state(encoder, nnx.Param)))
    assert count == pytest.approx(million * 1e6, rel=2e-3)  # of insightface's backbones
    # A file that lacks a block is not detected as a smaller network.
    gone = f"layer3.{config.depths[2] - 1}."
    path.write_text(json.dumps({"tensors": {k: x for k, x in shapes.items() if not k.startswith(gone)}}))
    assert detect(open_weights(path))[0].plan()[1].problems


def test_training_uses_and_records_batch_statistics(faces):
    import torch

    model = torch_iresnet(TINY)
    encoder = ours(model)
    model.train()
    wanted = model(torch.from_numpy(faces.transpose(0, 3, 1, 2).copy())).detach().numpy()
    encoder.train()
    embedding, _ = nnx.jit(lambda encoder, x: encoder(x))(encoder, jnp.asarray(faces))
    assert relative(embedding, wanted) < 1e-3
    for key, value in export(table.official_rules(TINY), flat_parameters(encoder)):
        if key.endswith("running_mean"):
            assert relative(value, model.state_dict()[key].numpy()) < 1e-4, key
    encoder.eval()
    alone = encode(encoder, jnp.asarray(faces[:1]))[0]
    assert relative(alone[0], encode(encoder, jnp.asarray(faces))[0][0]) < 1e-5


def test_wrong_sizes_are_errors():
    with pytest.raises(ConfigError, match="image_size"):
        FaceEncoderConfig(image_size=40)
    with pytest.raises(ConfigError, match="depths"):
        FaceEncoderConfig(depths=(1, 2))
    encoder = abstract(FaceEncoder, TINY)
    with pytest.raises(ValueError, match="48 x 48"):
        nnx.eval_shape(lambda encoder: encoder(jnp.zeros((1, 48, 48, 3))), encoder)
