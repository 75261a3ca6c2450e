"""The main job, as users start it: a picture, a sound and a prompt become an mp4."""

import gc
import hashlib
import subprocess
import sys
import time
import wave
import weakref
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA
from PIL import Image
from safetensors.numpy import load_file, save

from fantasy_jax import cli
from fantasy_jax.config import build, load_config
from fantasy_jax.data.text import byte_tokenizer
from fantasy_jax.media import read_video
from fantasy_jax.pipeline import (
    ModelConfig,
    RandomNetworks,
    SampleConfig,
    generate_latents,
    latent_shape,
    read_noise,
    save_latents,
)
from sample import main

ROOT = Path(__file__).parent.parent
FULL = str(ROOT / "configs/fantasy_talking_14b.py")
DEBUG = f"{FULL}:debug"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A portrait-like picture and two seconds of sound."""
    folder = tmp_path_factory.mktemp("inputs")
    rows, columns = np.mgrid[0:96, 0:96]
    face = (((rows - 50) / 36) ** 2 + ((columns - 48) / 28) ** 2 < 1)[..., None]
    Image.fromarray(np.where(face, [224, 180, 150], [60, 90, 130]).astype(np.uint8)).save(folder / "face.png")
    time = np.arange(2 * 22050) / 22050
    samples = (8000 * np.sin(2 * np.pi * 220 * time) * (np.sin(2 * np.pi * 3 * time) > 0)).astype("<i2")
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes(samples.tobytes())
    return folder


def save_tokenizer(folder, texts):
    """A small tokenizer of UMT5's kind: pieces with probabilities, an end token after every text."""
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


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "sample.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def common(folder, output="out/first.mp4"):
    return [
        f"--config={ROOT / 'configs/tiny.py'}",
        f"--image={folder / 'face.png'}",
        f"--audio={folder / 'voice.wav'}",
        f"--output={output}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "speech",
    [
        [],
        [
            f"--wav2vec2={DATA / 'wav2vec2'}",
            "--config.model.audio_adapter.feature_width=48",
            "--config.model.speech_encoder.hidden_size=48",
        ],
    ],
)
def test_a_picture_and_a_sound_become_a_video(inputs, tmp_path, monkeypatch, capsys, speech):
    monkeypatch.chdir(tmp_path)
    settings = ["--weights=", "--prompt=A woman is talking.", "--seed=3", "--config.sample.steps=2"]
    main([*common(inputs), *settings, *speech])
    done = capsys.readouterr()
    for phase in ("Text encoder", "First frame through the VAE", "Transformer", "Latents to video"):
        assert phase in done.out
    assert "they are random, and the video will be noise" in done.out
    assert "The sound lasts 2.00 s and is cut to the video's 0.68 s." in done.out
    assert "Sampling: 100%" in done.err
    frames, fps = read_video(tmp_path / "out/first.mp4")
    assert frames.shape == (17, 64, 64, 3)
    assert fps == 25
    with av.open(str(tmp_path / "out/first.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert abs(video.duration * video.time_base - audio.duration * audio.time_base) < 1 / 25
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first.mp4", "first.png"]


def test_a_wav2vec2_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch, capsys):
    random = [*common(inputs), "--weights="]
    error = refused(tmp_path, monkeypatch, capsys, [*random, f"--wav2vec2={DATA / 'wav2vec2'}"])
    assert "feature_width is 96, but the speech encoder's features have width 48" in error
    error = refused(tmp_path, monkeypatch, capsys, [*random, f"--wav2vec2={DATA / 'wan_vae'}"])
    assert "holds wan_vae, where wav2vec2 is meant" in error


def test_features_tell_sounds_apart():
    from fantasy_jax.data.speech import load_wav2vec2

    time = np.arange(16000) / 16000
    sounds = [0.3 * np.sin(2 * np.pi * hertz * time).astype(np.float32) for hertz in (200, 900)]
    encoder = load_wav2vec2(DATA / "wav2vec2")
    low, high = (np.asarray(encoder(sound)) for sound in sounds)
    assert low.shape == (1, 49, encoder.width)
    assert np.abs(low - high).mean() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--image=none.png", "none.png: no such picture"),
        ("--audio=none.wav", "none.wav: no such sound file"),
        ("--config=none.py", "none.py: no such config file"),
        (
            f"--config={FULL}:small",
            "fantasy_talking_14b.py:small: no such variant; use full, lora, everything or debug",
        ),
        (
            f"--config={FULL}",
            "fantasy_talking_14b: no such folder; convert_weights.py import makes it",
        ),
        ("--weights=none", "none: no such folder"),
        ("--tokenizer=none", "--tokenizer goes with random weights"),
        (f"--weights={DATA}", "holds no complete weights"),
        ("--noise=none.safetensors", "none.safetensors: no such file"),
        ("--config.sample.stepz=3", "sample.stepz: no such setting; did you mean steps?"),
        ("--config.sample.steps=many", "sample.steps: wants int, not 'many'"),
        ("--config.sample.steps=0", "sample.steps is 0; at least 1 is needed"),
        ("--config.sample.max_frames=16", "max_frames is 16; it must be 4k + 1"),
        ("--config.model.dtype=float99", "model.dtype: is 'float99'; use one of 'float32', 'bfloat16'"),
        ("--config.model.transformer.num_heads=7", "num_heads is 7; it must cut dim 160 into even parts"),
        ("--config.model.transformer.dim=80", "audio_adapter.width is 160, but what it is joined to has 80"),
        ("--seed=x", "argument --seed: invalid int value: 'x'"),
        ("--colour=red", "unrecognized arguments: --colour=red"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(inputs, tmp_path, monkeypatch, capsys, change, message):
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), change])
    assert message in error
    assert not list(tmp_path.rglob("*.mp4"))


def test_an_output_that_cannot_be_written_is_found_before_any_work(inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    error = refused(tmp_path, monkeypatch, capsys, common(inputs, output="file/first.mp4"))
    assert "cannot be written" in error


@pytest.mark.parametrize("own", [f"--wav2vec2={DATA / 'wav2vec2'}", f"--tokenizer={DATA}"])
def test_stored_weights_are_not_mixed_with_others(inputs, tmp_path, monkeypatch, capsys, own):
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), f"--weights={DATA}", own])
    assert f"{own.partition('=')[0]} goes with random weights" in error


def test_a_tokenizer_of_more_tokens_than_the_encoder_is_refused(inputs, tmp_path, monkeypatch, capsys):
    save_tokenizer(tmp_path / "tokenizer", ["A person is talking."])
    settings = [f"--tokenizer={tmp_path / 'tokenizer'}", "--config.model.text_encoder.vocab_size=5"]
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), "--weights=", *settings])
    assert "vocab_size is 5, but the tokenizer has" in error


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("none", "no such folder; give one that holds a tokenizer"),
        (DATA, "holds no tokenizer that can be read"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(inputs, tmp_path, monkeypatch, capsys, folder, message):
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), "--weights=", f"--tokenizer={folder}"])
    assert message in error


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"noise": np.zeros((1, 32, 5, 8, 9), np.float32)}, "noise is float32 of 1 x 32 x 5 x 8 x 9; this"),
        ({"noise": np.zeros((1, 32, 5, 8, 8), np.int32)}, "ask for float32 of 1 x 32 x 5 x 8 x 8"),
        ({"noise": np.full((1, 32, 5, 8, 8), np.nan, np.float32)}, "values that are no numbers"),
        ({"latents": np.zeros((1, 32, 5, 8, 8), np.float32)}, "holds latents; give one tensor, noise"),
        (None, "damaged or cut off"),
    ],
)
def test_noise_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch, capsys, tensors, message):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(save(tensors or {"noise": np.zeros((1, 32, 5, 8, 8), np.float32)}))
    if tensors is None:
        path.write_bytes(path.read_bytes()[:-100])
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), f"--noise={path}"])
    assert "noise.safetensors: " in error
    assert message in error


def test_noise_and_latents_are_laid_out_as_pytorch_has_them(tmp_path):
    noise = np.random.default_rng(0).standard_normal((1, 16, 3, 4, 6), np.float32)
    (tmp_path / "noise.safetensors").write_bytes(save({"noise": noise}))
    ours = read_noise(tmp_path / "noise.safetensors", (1, 3, 4, 6, 16))
    assert np.array_equal(ours, noise.transpose(0, 2, 3, 4, 1))
    save_latents(tmp_path / "new/latents.safetensors", ours)
    assert np.array_equal(load_file(tmp_path / "new/latents.safetensors")["latents"], noise)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["latents.safetensors"]


@pytest.mark.parametrize(
    ("size", "seconds", "shape"),
    [((640, 480), 10, (1, 21, 48, 64, 16)), ((97, 61), 0.5, (1, 4, 42, 64, 16))],
)
def test_the_shape_of_latents_at_full_size(size, seconds, shape):
    sound = np.zeros(int(16_000 * seconds), np.float32)
    assert latent_shape(Image.new("RGB", size), sound, SampleConfig(), 16) == shape


def test_the_full_size_config_has_the_official_defaults():
    config = load_config(FULL)
    assert build(ModelConfig, config.model, "model") == ModelConfig()
    settings = build(SampleConfig, config.sample, "sample")
    assert (settings.steps, settings.shift, settings.prompt_scale, settings.audio_scale) == (30, 5, 5, 5)
    assert (settings.longest_edge, settings.fps, settings.max_frames) == (512, 23, 81)
    assert (settings.tile, settings.tile_stride) == ((30, 52), (15, 26))
    assert settings.negative_prompt.startswith("人物静止不动，静止，色调艳丽")
    assert hashlib.sha256(settings.negative_prompt.encode()).hexdigest()[:16] == "c14ba6c81b9d8490"


@pytest.mark.slow
def test_the_debug_configuration_is_quick(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer", [load_config(DEBUG).sample.negative_prompt])
    start = time.monotonic()
    paths = ["--tokenizer=tokenizer", "--save_latents=out/latents.safetensors"]
    main([*common(inputs), f"--config={DEBUG}", *paths])
    assert time.monotonic() - start < 120
    assert "out/latents.safetensors: the latents" in capsys.readouterr().out
    assert load_file("out/latents.safetensors")["latents"].shape == (1, 16, 3, 8, 8)
    assert read_video("out/first.mp4")[0].shape == (9, 64, 64, 3)


@pytest.mark.slow
def test_devices_can_share_the_work(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*common(inputs), "--config.sample.steps=2"]
    main([*settings, "--save_latents=one.safetensors"])
    video, _ = read_video(tmp_path / "out/first.mp4")
    mesh = ["--config.sample.mesh.context=2", "--config.sample.mesh.tensor=4"]
    main([*settings, *mesh, "--save_latents=eight.safetensors"])
    one, eight = (load_file(f"{name}.safetensors")["latents"] for name in ("one", "eight"))
    assert np.abs(one - eight).max() < 1e-4
    shared, _ = read_video(tmp_path / "out/first.mp4")
    assert np.abs(video.astype(int) - shared).mean() < 0.5  # of 255; what is left is the codec's


def refused(folder, monkeypatch, capsys, arguments):
    """The one line that a refusal prints."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(arguments), "sample.py")
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("sample.py: error: ")
    assert len(printed.err.splitlines()) == 1
    return printed.err


class Watched(RandomNetworks):
    """Remembers which encoders were alive when the transformer was asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.encoders, self.alive = {}, None

    def watch(self, name, network):
        self.encoders[name] = weakref.ref(network)
        return network

    def text_encoder(self):
        encoder, tokenizer = super().text_encoder()
        return self.watch("text", encoder), tokenizer

    def image_encoder(self):
        return self.watch("picture", super().image_encoder())

    def speech_encoder(self):
        return self.watch("speech", super().speech_encoder())

    def vae(self):
        return self.watch("vae", super().vae())

    def transformer(self):
        gc.collect()
        self.alive = [name for name, encoder in self.encoders.items() if encoder() is not None]
        return super().transformer()


def test_encoders_are_gone_before_the_transformer_comes():
    config = load_config(DEBUG)
    networks = Watched(build(ModelConfig, config.model, "model"), byte_tokenizer())
    settings = build(SampleConfig, config.sample, "sample")
    picture, sound = Image.new("RGB", (64, 64)), np.zeros(16000, np.float32)
    noise = np.zeros(latent_shape(picture, sound, settings, 16), np.float32)
    generate_latents(
        networks,
        settings,
        picture=picture,
        sound=sound,
        prompt="A person is talking.",
        noise=jnp.asarray(noise),
    )
    assert set(networks.encoders) == {"text", "picture", "speech", "vae"}
    assert networks.alive == []


def test_help_shows_examples():
    done = start(ROOT, "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "--config.sample.steps=20" in done.stdout
