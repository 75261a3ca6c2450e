"""PD-FGC's motion encoder against the reference and PyTorch, and its file there and back."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import DATA, abstract, as_float32, fill, relative, run_convert_weights
from safetensors.numpy import load_file, save_file

from fantasy_jax.convert import motion_encoder as table
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import COUNTER, flat_parameters
from fantasy_jax.errors import ConfigError, ConversionError, WeightsError
from fantasy_jax.models.motion_encoder import MotionEncoder, MotionEncoderConfig, upsample
from fantasy_jax.weights.detect import detect

pytestmark = pytest.mark.usefixtures("highest_precision")

REFERENCE = DATA / "pdfgc_motion_encoder"
PARTS = ("headpose", "eye", "emotion", "mouth")
SMALL = MotionEncoderConfig(
    width=16, feature_dim=24, pose_dim=5, eye_dim=4, emotion_dim=7, landmarks=9, depth=2, image_size=56
)

encode = nnx.jit(lambda model, pixels: model(pixels))


def torch_encoder(config):
    """The official module, rewritten with its names; parameters, statistics and counters are random."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    def conv(channels, width, size=3):
        return nn.Conv2d(channels, width, size, padding=size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, channels, width):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, width // 2)
            self.bn2, self.conv2 = nn.BatchNorm2d(width // 2), conv(width // 2, width // 4)
            self.bn3, self.conv3 = nn.BatchNorm2d(width // 4), conv(width // 4, width // 4)
            self.downsample = None
            if channels != width:
                norm = nn.BatchNorm2d(channels)
                self.downsample = nn.Sequential(norm, nn.ReLU(), conv(channels, width, 1))

        def forward(self, x):
            first = self.conv1(F.relu(self.bn1(x)))
            second = self.conv2(F.relu(self.bn2(first)))
            third = self.conv3(F.relu(self.bn3(second)))
            past = x if self.downsample is None else self.downsample(x)
            return torch.cat([first, second, third], 1) + past

    class Hourglass(nn.Module):
        def __init__(self):
            super().__init__()
            for level in range(1, config.depth + 1):
                for number in (1, 2, 3):
                    self.add_module(f"b{number}_{level}", Block(config.width, config.width))
            self.b2_plus_1 = Block(config.width, config.width)

        def forward(self, x, level=config.depth):
            upper = getattr(self, f"b1_{level}")(x)
            lower = getattr(self, f"b2_{level}")(F.max_pool2d(x, 2, 2))
            lower = self.forward(lower, level - 1) if level > 1 else self.b2_plus_1(lower)
            lower = getattr(self, f"b3_{level}")(lower)
            return upper + F.interpolate(lower, upper.shape[2:], mode="bilinear", align_corners=False)

    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            width = config.width
            self.conv1, self.bn1 = nn.Conv2d(3, width // 4, 7, 2, 3), nn.BatchNorm2d(width // 4)
            self.conv2, self.conv3 = Block(width // 4, width // 2), Block(width // 2, width // 2)
            self.conv4, self.m0, self.top_m_0 = Block(width // 2, width), Hourglass(), Block(width, width)
            self.conv_last0, self.bn_end0 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
            self.l0, self.bn5 = nn.Conv2d(width, config.landmarks, 1), nn.BatchNorm2d(config.landmarks)
            self.conv6 = nn.Conv2d(config.landmarks, 1, 3, 2, 1)
            self.fc = nn.Linear((config.image_size // 8) ** 2, config.feature_dim)

        def forward(self, x):
            x = F.max_pool2d(self.conv2(F.relu(self.bn1(self.conv1(x)))), 2)
            x = self.top_m_0(self.m0(self.conv4(self.conv3(x))))
            x = self.l0(F.relu(self.bn_end0(self.conv_last0(x))))
            return self.fc(F.relu(torch.flatten(self.conv6(F.relu(self.bn5(x))), 1)))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Trunk()
            width = config.feature_dim
            unused = width - config.pose_dim - config.eye_dim
            sizes = {"mouth": unused, "headpose": config.pose_dim, "eye": config.eye_dim}
            for name, size in (sizes | {"emo": config.emotion_dim}).items():
                layers = nn.Linear(width, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Linear(width, width)
                self.add_module(f"to_{name}", nn.Sequential(*layers))
                self.add_module(f"{name}_embed", nn.Sequential(nn.ReLU(), nn.Linear(width, size)))

        def forward(self, x):
            x = self.model(x)
            pose, eye = self.headpose_embed(self.to_headpose(x)), self.eye_embed(self.to_eye(x))
            return torch.cat([pose, eye, self.emo_embed(self.to_emo(x)), self.to_mouth(x)], 1)

    torch.manual_seed(0)
    encoder = Encoder().eval()
    with torch.no_grad():
        for name, value in encoder.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
            elif value.is_floating_point():
                value.add_(torch.randn_like(value) * 0.1)
            else:
                value.copy_(torch.randint(2**31, ()))
    return encoder


def arrays(encoder):
    """The tensors of PyTorch's module."""
    return {key: value.numpy().copy() for key, value in encoder.state_dict().items()}


@pytest.fixture(scope="module")
def tensors():
    """Random tensors under the official keys."""
    return arrays(torch_encoder(SMALL))


@pytest.fixture
def file(tmp_path, tensors):
    """A file of random tensors, with its sizes beside it."""
    sizes = dataclasses.asdict(SMALL)
    sizes["hourglass_depth"] = sizes.pop("depth")
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    save_file(tensors, tmp_path / "pd_fpg.safetensors")
    return tmp_path / "pd_fpg.safetensors"


def test_all_features_equal_the_reference_in_their_order():
    (found,) = detect(open_weights(REFERENCE))
    activations = load_file(REFERENCE / "activations.safetensors")
    features = encode(found.load(), jnp.asarray(np.moveaxis(activations["input.image"], 1, -1)))
    assert features.dtype == jnp.float32
    assert features.shape == (2, found.config.num_features)
    # The features of the reference differ from those of a computation in float64 by up to 4.7e-6.
    splits = np.cumsum([activations[f"output.{name}"].shape[1] for name in PARTS])[:-1]
    for name, part in zip(PARTS, np.split(features, splits, axis=1), strict=True):
        assert relative(part, activations[f"output.{name}"]) < 8e-6, name


@pytest.mark.parametrize(
    "changes",
    [
        {},  # 14, 7 and 3 positions: an upsampling of 3 to 7
        {"image_size": 88, "depth": 3},  # 22, 11, 5 and 2: 2 to 5, 5 to 11
        {"image_size": 48, "depth": 3, "width": 8},  # 12, 6, 3 and 1: 1 to 3
    ],
)
def test_parity_with_pytorch_at_other_sizes(changes):
    import torch

    config = dataclasses.replace(SMALL, **changes)
    theirs = torch_encoder(config)
    size = config.image_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).numpy()
    ours = fill(abstract(MotionEncoder, config), table.official_rules(config), arrays(theirs))
    assert relative(encode(ours, jnp.asarray(pixels)), wanted) < 4e-6


@pytest.mark.parametrize("sizes", [((3, 3), (7, 7)), ((1, 2), (3, 5)), ((5, 4), (11, 9)), ((28, 7), (56, 7))])
def test_upsampling_equals_pytorchs(sizes):
    import torch

    x = np.random.default_rng(0).standard_normal((2, *sizes[0], 3), np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), sizes[1], mode="bilinear", align_corners=False
    )
    assert relative(upsample(jnp.asarray(x), sizes[1]), theirs.numpy().transpose(0, 2, 3, 1)) < 2e-7


def test_the_published_file_maps_completely():
    (found,) = detect(open_weights(DATA / "manifests" / "pd_fpg.json"))
    _, plan = found.plan()
    assert (found.preset, found.config) == ("pd_fgc", MotionEncoderConfig())
    assert (plan.problems, plan.ignored) == ([], {})
    assert len(plan.entries) == len(found.weights.specs) == 387
    assert sum(entry.transform is COUNTER for entry in plan.entries) == 60


def test_numbers_of_the_published_file():
    manifest = json.loads((DATA / "manifests" / "pd_fpg.json").read_text())
    encoder = abstract(MotionEncoder, MotionEncoderConfig())
    everything = sum(math.prod(x.shape) for x in flat_parameters(encoder).values())
    assert everything == manifest["parameters"] == 9_054_995  # with statistics and counters of the norms
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(encoder, nnx.Param)))
    assert trained == 9_035_727
    unused = sum(x.size for x in jax.tree.leaves(nnx.state(encoder.mouth_embed)))
    assert trained - unused == 8_779_227
    assert MotionEncoderConfig().num_features == 554


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_returns_the_file(tmp_path, tensors, file, capsys, dtype):
    store, output = tmp_path / "store", tmp_path / "out.safetensors"
    code, out, _ = run_convert_weights(
        capsys, "import", "--pd_fpg", file, "--output", store, "--dtype", dtype
    )
    assert code == 0
    assert "motion_encoder: 0.00 GiB of float32" in out  # whatever the type of the other networks
    options = ["--component", "motion_encoder", "--output", output]
    assert run_convert_weights(capsys, "export", "--weights", store, *options)[0] == 0
    exported = load_file(output)
    assert exported.keys() == tensors.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, tensors[key], strict=True)
    assert exported["model.bn1.num_batches_tracked"].dtype == np.int64


def test_a_pth_file_of_half_precision_is_read(tmp_path, tensors, file):
    import torch

    half = {
        k: torch.from_numpy(v).half() if v.dtype == np.float32 else torch.from_numpy(v)
        for k, v in tensors.items()
    }
    torch.save(half, tmp_path / "pd_fpg.pth")
    (found,) = detect(open_weights(tmp_path / "pd_fpg.pth"))
    values = flat_parameters(found.load())
    for entry in found.plan()[1].entries:
        value = entry.transform.inverse(np.asarray(values[entry.path]))
        np.testing.assert_array_equal(value, as_float32(half[entry.key].numpy()), strict=True)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.m0.b3_1.conv2.weight", "missing"),
        ("model.bn5.num_batches_tracked", "missing"),
        ("mouth_embed.1.bias", "missing"),
        ("model.avgpool.weight", "unexpected"),
    ],
)
def test_files_are_read_strictly(file, tensors, key, kind):
    changed = dict(tensors)
    if kind == "missing":
        del changed[key]
    else:
        changed[key] = np.zeros(1, np.float32)
    save_file(changed, file)
    with pytest.raises(ConversionError, match=f"^{file}: {kind}: ") as caught:
        detect(open_weights(file))[0].load()
    assert len(caught.value.problems) == 1


def test_a_counter_that_does_not_fit_is_an_error(file, tensors):
    save_file(tensors | {"model.bn1.num_batches_tracked": np.array(2**31)}, file)
    with pytest.raises(WeightsError, match="2147483648"):
        detect(open_weights(file))[0].load()


def test_wrong_sizes_are_errors():
    for changes, named in (
        ({"width": 12}, "width"),
        ({"feature_dim": 9}, "feature_dim"),
        ({"depth": 0}, "depth"),
        ({"image_size": 60}, "image_size"),
        ({"image_size": 56, "depth": 4}, "image_size"),
    ):
        with pytest.raises(ConfigError, match=f"^{named}"):
            dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match="48 x 56"):
        nnx.eval_shape(lambda encoder: encoder(jnp.zeros((1, 48, 56, 3))), abstract(MotionEncoder, SMALL))
