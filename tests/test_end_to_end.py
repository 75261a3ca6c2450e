"""The whole path against PyTorch's: the same image, audio, prompt and noise give the same latents.

`sample.py` runs the debug configuration of the 14B system with random weights, none of them zero.
`torch_system` computes the same from the same files with PyTorch; its weights are ours, converted by the
tables that export them.
"""

import shutil
import wave
import weakref

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import random_network, relative
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_sample import DEBUG, refused

from fantasy_jax.config import build, load_config
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks
from fantasy_jax.system.registry import component_of
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.loading import StoredLoader
from fantasy_jax.weights.store import TOKENIZER, save_network
from sample import main

pytestmark = [
    pytest.mark.slow,
    # diffusers and its dependencies announce their own changes.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

PROMPT = "A  woman is talking &amp;amp; smiling, “softly”."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Image, audio, tokenizer and noise."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:61, 0:97]
    colours = np.stack([rows * 4, columns * 2, 128 + 90 * np.sin(rows / 7) * np.cos(columns / 9)], axis=-1)
    Image.fromarray(colours.astype(np.uint8)).save(folder / "face.png")
    time = np.arange(6_260) / 16_000  # nine frames
    tone = 9_000 * (np.sin(2 * np.pi * 3 * time) > 0) * np.sin(2 * np.pi * 220 * time)
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((tone + 300 * random.standard_normal(time.size)).astype("<i2").tobytes())
    save_tokenizer(folder / "tokenizer", [PROMPT, load_config(DEBUG).sample.negative_prompt])
    noise = random.standard_normal((1, 16, 3, 6, 8), np.float32)
    save_file({"noise": noise}, folder / "noise.safetensors")
    return folder


def save_tokenizer(folder, texts):
    """A small tokenizer of UMT5's kind: pieces with probabilities, and an end token after every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def config():
    """Settings of sampling."""
    return build(SampleConfig, load_config(DEBUG).sample, "sample")


@pytest.fixture(scope="module")
def networks():
    """Our networks, with random weights."""

    def load(component, config, dtype, mesh):
        return random_network(config, scale=0.1)

    model = build(ModelConfig, load_config(DEBUG).model, "model")
    return Networks(model, load, byte_tokenizer)


@pytest.fixture(scope="module")
def weights(networks, files, tmp_path_factory):
    """A store of our networks, with the tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    for slot, network in networks.items():
        save_network(folder / slot, network, component=component_of(network.config).name)
    shutil.copytree(files / "tokenizer", folder / "text_encoder" / TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def torch_parts(files, networks, config):
    """PyTorch's sampler, as a function of the transformer's inputs, and the inputs."""
    import torch_system as reference

    parts = reference.torch_networks(networks)
    video = build(VideoConfig, load_config(DEBUG).video, "video")
    pixels = reference.read_image(files / "face.png", video.longest_edge)
    prompt, negative = (
        reference.encode_text(parts["text_encoder"], files / "tokenizer", text)
        for text in (PROMPT, config.negative_prompt)
    )
    inputs = {
        "prompt": prompt,
        "negative": negative,
        "image": reference.encode_image(parts["image_encoder"], pixels),
        "audio": reference.encode_audio(parts["speech_encoder"], files / "voice.wav", 9 / 23),
        "first_frame": reference.encode_first_frame(parts["vae"], pixels, 9),
        "noise": from_file(files / "noise.safetensors", "noise"),
    }
    return lambda inputs: reference.sample(parts["transformer"], inputs, config, 9), inputs


@pytest.fixture(scope="module")
def expected(torch_parts):
    """PyTorch's final latents."""
    sample, inputs = torch_parts
    return sample(inputs)


def from_file(path, name):
    import torch

    return torch.from_numpy(load_file(path)[name])


def command(files, weights, output):
    """Arguments of sample.py."""
    return [
        f"--config={DEBUG}",
        f"--weights={weights}",
        f"--image={files / 'face.png'}",
        f"--audio={files / 'voice.wav'}",
        f"--noise={files / 'noise.safetensors'}",
        f"--prompt={PROMPT}",
        f"--output={output}",
        f"--save_latents={output.with_suffix('.safetensors')}",
    ]


@pytest.fixture
def in_memory(monkeypatch):
    """The networks that are in memory when the transformer is loaded, among those that were loaded."""
    load, parameters, found = StoredLoader.__call__, {}, {}

    def watched(self, component, config, dtype, mesh):
        if component.slot == "transformer":
            assert sum(map(len, parameters.values())) > 100
            found["loaded"] = set(parameters)
            found["alive"] = {
                slot for slot, leaves in parameters.items() if any(leaf() is not None for leaf in leaves)
            }
        network = load(self, component, config, dtype, mesh)
        parameters[component.slot] = [
            weakref.ref(leaf) for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))
        ]
        return network

    monkeypatch.setattr(StoredLoader, "__call__", watched)
    return found


def test_latents_are_those_of_pytorch(files, weights, expected, tmp_path, in_memory, capsys):
    with jax.default_matmul_precision("highest"):
        main(command(files, weights, tmp_path / "video.mp4"))
    assert "random" not in capsys.readouterr().out
    difference = relative(from_file(tmp_path / "video.safetensors", "latents"), expected)
    with capsys.disabled():
        print(f" [{difference:.1e}]", end="")
    assert difference < 1e-5
    # The encoders are released, and so is the VAE, which is loaded again to decode the video.
    assert in_memory == {
        "loaded": {"text_encoder", "image_encoder", "speech_encoder", "vae"},
        "alive": set(),
    }


@pytest.mark.parametrize("name", ["prompt", "negative", "image", "audio", "first_frame", "noise"])
def test_latents_depend_on_every_input(torch_parts, expected, name):
    """The effect of each input is far above the limit, so that an error in it would be found."""
    sample, inputs = torch_parts
    assert relative(sample(inputs | {name: inputs[name].flip(-1)}), expected) > 1e-3


def truncate(folder):
    """Removes a byte from one of the files of the VAE."""
    largest = max(
        (path for path in folder.rglob("vae/**/*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [truncate, lambda folder: (folder / "vae/component.json").unlink()])
def test_an_error_for_damaged_weights_is_one_line(files, weights, tmp_path, monkeypatch, capsys, damage):
    damaged = shutil.copytree(weights, tmp_path / "weights")
    damage(damaged)
    arguments = command(files, damaged, tmp_path / "video.mp4")
    assert str(damaged / "vae") in refused(tmp_path, monkeypatch, capsys, arguments)
    assert not list(tmp_path.glob("video*"))


def test_weights_of_another_model_are_refused(files, weights, tmp_path, monkeypatch, capsys):
    other = "--config.model.text_encoder.num_layers=3"
    arguments = [*command(files, weights, tmp_path / "video.mp4"), other]
    error = refused(tmp_path, monkeypatch, capsys, arguments)
    assert str(weights / "text_encoder") in error
    assert "num_layers 2" in error
