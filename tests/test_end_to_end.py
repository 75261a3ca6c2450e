"""The whole path against PyTorch's: one image, audio, prompt and noise; the final latents are compared.

`sample.py` runs the debug configuration of the 14B system with random weights, none of them zero. The same
is computed from the same files with PyTorch: encoders of transformers, the VAE of diffusers, and the
transformer with its audio adapter as the functions below, written after Wan2.1, `wan/modules/model.py`, and
fantasy-talking, `model.py`. The tables that export weights give PyTorch the same weights.
"""

import html
import re
import shutil
import wave
from dataclasses import asdict
from itertools import pairwise

import ftfy
import jax
import numpy as np
import pytest
from helpers import randomise, relative, to_torch, transformers_clip_vision, transformers_umt5
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_sample import DEBUG, refused

from fantasy_jax.config import build, load_config
from fantasy_jax.convert import clip_vision, umt5, vae, wan, wav2vec2
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.preprocessing.text import byte_tokenizer
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import Networks, RandomLoader
from fantasy_jax.system.registry import component_of
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.store import TOKENIZER, save_network
from sample import main

pytestmark = [
    pytest.mark.slow,
    # diffusers and what it imports announce their own changes.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

PROMPT = "A  woman is talking &amp;amp; smiling, “softly”."


class RandomisedLoader(RandomLoader):
    """Draws networks of which no parameter is zero, unlike a new adapter's values and the last layer."""

    def __call__(self, *arguments):
        return randomise(super().__call__(*arguments), scale=0.1)


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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Image, audio, tokenizer and noise."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:61, 0:97]
    colours = np.stack([rows * 4, columns * 2, 128 + 90 * np.sin(rows / 7) * np.cos(columns / 9)], axis=-1)
    Image.fromarray(colours.astype(np.uint8)).save(folder / "face.png")
    time = np.arange(8_000) / 16_000
    envelope = 9_000 * (np.sin(2 * np.pi * 3 * time) > 0) * np.sin(2 * np.pi * 220 * time)
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((envelope + 300 * random.standard_normal(time.size)).astype("<i2").tobytes())
    save_tokenizer(folder / "tokenizer", [PROMPT, load_config(DEBUG).sample.negative_prompt])
    noise = random.standard_normal((1, 16, 3, 6, 8), np.float32)
    save_file({"noise": noise}, folder / "noise.safetensors")
    return folder


# PyTorch's side follows, where latents are [1, C, F, h, w].


def torch_text(encoder, folder, prompt):
    """The prompt's tokens, zeros behind them up to 512: `[1, 512, C]`."""
    import torch
    from transformers import AutoTokenizer

    cleaned = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    given = AutoTokenizer.from_pretrained(folder)(
        re.sub(r"\s+", " ", cleaned),
        padding="max_length",
        truncation=True,
        max_length=512,
        return_tensors="pt",
    )
    hidden = encoder(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    return torch.where(given.attention_mask[..., None].bool(), hidden, 0)


def torch_image(path, longest_edge):
    """Pixels in [-1, 1], `[3, H, W]`."""
    import torch

    image = Image.open(path).convert("RGB")
    scale = longest_edge / max(image.size)
    image = image.resize(tuple(int(side * scale) for side in image.size), Image.LANCZOS)
    image = image.resize(tuple((side + 15) // 16 * 16 for side in image.size))
    return torch.tensor(np.array(image, np.float32) * (2 / 255) - 1).permute(2, 0, 1)


def torch_clip(tower, pixels):
    """Features of the last block but one."""
    import torch

    size = tower.config.image_size
    small = torch.nn.functional.interpolate(pixels[None], (size, size), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    given = (small * 0.5 + 0.5 - mean) / std
    return tower(given, output_hidden_states=True).hidden_states[-2]


def torch_speech(encoder, path, seconds):
    """wav2vec2's last hidden state of the clip's audio."""
    from transformers import Wav2Vec2FeatureExtractor

    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    cut = samples[: int(seconds * 16_000)]
    given = Wav2Vec2FeatureExtractor()(cut, sampling_rate=16_000, return_tensors="pt").input_values
    return encoder(given).last_hidden_state


def torch_first_frame(autoencoder, pixels, num_frames):
    """Mask, and the normalised latents of the image followed by grey frames."""
    import torch

    grey = torch.zeros(3, num_frames - 1, *pixels.shape[1:])
    video = torch.cat([pixels[:, None], grey], dim=1)[None]
    config = autoencoder.config
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (config.latents_mean, config.latents_std))
    latents = (autoencoder.encode(video).latent_dist.mode() - mean) / std
    mask = torch.zeros(1, 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


def torch_windows(tokens, num_frames, expand=4):
    """The audio tokens that each latent frame hears, `[F, L, C]`, and how many are real."""
    import torch

    per_frame = tokens.shape[1] / num_frames
    half = int(per_frame * 4 / 2)
    ends = [per_frame * (4 * i + 1) for i in range(num_frames // 4 + 1)]
    centres = [int((a + b) / 2) - 1 for a, b in pairwise(ends)]
    first = centres[0] - half
    ranges = [(first - 2 * half, first), *((centre - half, centre + half) for centre in centres)]
    windows, lengths = [], []
    for start, end in ranges:
        real = tokens[0, max(start - expand, 0) : end + expand + 1]
        lengths.append(len(real))
        missing = 2 * (half + expand) + 1 - len(real)
        windows.append(torch.nn.functional.pad(real, (0, 0, 0, missing)))
    return torch.stack(windows), lengths


class TorchTransformer:
    """The transformer and the audio adapter, computed from their official state dicts."""

    def __init__(self, config, weights, audio_weights):
        """Keeps the weights; `config` is our WanConfig."""
        self.config = config
        self.weights = weights
        self.audio_weights = audio_weights

    def linear(self, key, x):
        import torch

        return torch.nn.functional.linear(x, self.weights[f"{key}.weight"], self.weights.get(f"{key}.bias"))

    def layer_norm(self, x, key=None, epsilon=1e-6):
        import torch

        scale, shift = (self.weights[f"{key}.{part}"] for part in ("weight", "bias")) if key else (None, None)
        return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, shift, epsilon)

    def rms_norm(self, key, x):
        import torch

        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weights[f"{key}.weight"], 1e-6)

    def attend(self, q, k, v):
        """`[B, L, D]` each, heads split off here."""
        import torch

        q, k, v = (x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def rotate(self, x, grid):
        """Rotary positions over frames, rows and columns, as complex numbers of float64."""
        import torch

        width = self.config.dim // self.config.num_heads
        angles = []
        for axis, part in enumerate((width - 4 * (width // 6), 2 * (width // 6), 2 * (width // 6))):
            rates = 10_000 ** -(torch.arange(0, part, 2, dtype=torch.float64) / part)
            shape = [1, 1, 1, -1]
            shape[axis] = grid[axis]
            each = torch.outer(torch.arange(grid[axis], dtype=torch.float64), rates)
            angles.append(each.reshape(shape).expand(*grid, -1))
        turn = torch.cat(angles, dim=-1).reshape(-1, 1, width // 2)
        x = x.unflatten(-1, (self.config.num_heads, -1)).double().unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(x.contiguous()) * torch.polar(torch.ones_like(turn), turn)
        return torch.view_as_real(turned).flatten(2).float()

    def prepare(self, text, image, audio, num_frames):
        """The conditions of the blocks; `audio` None for none."""
        import torch

        functional = torch.nn.functional
        text = self.linear("text_embedding.0", text)
        text = self.linear("text_embedding.2", functional.gelu(text, approximate="tanh"))
        image = self.linear("img_emb.proj.1", self.layer_norm(image, "img_emb.proj.0", 1e-5))
        image = self.layer_norm(self.linear("img_emb.proj.3", functional.gelu(image)), "img_emb.proj.4", 1e-5)
        if audio is not None:
            weights = self.audio_weights
            tokens = functional.linear(audio, weights["proj_model.proj.weight"])
            scale, shift = weights["proj_model.norm.weight"], weights["proj_model.norm.bias"]
            audio = torch_windows(functional.layer_norm(tokens, tokens.shape[-1:], scale, shift), num_frames)
        return text, image, audio

    def attend_audio(self, block, q, audio):
        """Audio attention of one block, frame by frame."""
        import torch

        windows, lengths = audio
        name = f"audio_processor.{block}.cross_attn.processor"
        frames = []
        for frame, window, length in zip(q.chunk(len(lengths), dim=1), windows, lengths, strict=True):
            key, value = (
                torch.nn.functional.linear(
                    window[None, :length], self.audio_weights[f"{name}.{part}_proj.weight"]
                )
                for part in "kv"
            )
            frames.append(self.attend(frame, key, value))
        return torch.cat(frames, dim=1)

    def block(self, name, x, time, grid, text, image, audio):
        import torch

        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            self.weights[f"{name}.modulation"] + time
        ).chunk(6, 1)
        given = self.layer_norm(x) * (1 + scale) + shift
        attention = f"{name}.self_attn"
        q, k = (
            self.rotate(
                self.rms_norm(f"{attention}.norm_{part}", self.linear(f"{attention}.{part}", given)), grid
            )
            for part in "qk"
        )
        attended = self.attend(q.flatten(2), k.flatten(2), self.linear(f"{attention}.v", given))
        x = x + self.linear(f"{attention}.o", attended) * gate

        attention = f"{name}.cross_attn"
        q = self.linear(f"{attention}.q", self.layer_norm(x, f"{name}.norm3"))
        q = self.rms_norm(f"{attention}.norm_q", q)
        attended = 0
        for suffix, tokens in (("", text), ("_img", image)):
            k = self.rms_norm(f"{attention}.norm_k{suffix}", self.linear(f"{attention}.k{suffix}", tokens))
            attended = attended + self.attend(q, k, self.linear(f"{attention}.v{suffix}", tokens))
        if audio is not None:
            attended = attended + self.attend_audio(name, q, audio)
        x = x + self.linear(f"{attention}.o", attended)

        hidden = self.linear(f"{name}.ffn.0", self.layer_norm(x) * (1 + mlp_scale) + mlp_shift)
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        return x + self.linear(f"{name}.ffn.2", hidden) * mlp_gate

    def velocity(self, latents, first_frame, timestep, conditions):
        import torch

        functional = torch.nn.functional
        x = torch.cat([latents, first_frame], dim=1)
        x = functional.conv3d(
            x, self.weights["patch_embedding.weight"], self.weights["patch_embedding.bias"], stride=(1, 2, 2)
        )
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        half = self.config.frequency_dim // 2
        rates = 10_000 ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.tensor(timestep, dtype=torch.float64) * rates
        sinusoid = torch.cat([angles.cos(), angles.sin()])[None].float()
        time = self.linear("time_embedding.2", functional.silu(self.linear("time_embedding.0", sinusoid)))
        modulation = self.linear("time_projection.1", functional.silu(time)).unflatten(1, (6, -1))
        for index in range(self.config.num_layers):
            x = self.block(f"blocks.{index}", x, modulation, grid, *conditions)
        shift, scale = (self.weights["head.modulation"] + time[:, None]).chunk(2, dim=1)
        x = self.linear("head.head", self.layer_norm(x) * (1 + scale) + shift)
        x = x.reshape(1, *grid, 2, 2, -1)
        return torch.einsum("bfhwpqc->bcfhpwq", x).reshape(latents.shape)


def torch_sample(transformer, inputs, settings, num_frames):
    """Guided Euler steps."""
    branches = [
        transformer.prepare(inputs[text], inputs["image"], audio, num_frames)
        for text, audio in (("negative", None), ("prompt", None), ("prompt", inputs["audio"]))
    ]
    sigmas = np.linspace(1, 0, settings.num_inference_steps + 1)
    sigmas = settings.shift * sigmas / (1 + (settings.shift - 1) * sigmas)
    latents = inputs["noise"]
    for now, after in pairwise(sigmas):
        timestep = float(np.float32(now * 1000))
        negative, prompt, audio = (
            transformer.velocity(latents, inputs["first_frame"], timestep, branch) for branch in branches
        )
        velocity = negative + settings.text_guidance_scale * (prompt - negative)
        velocity = velocity + settings.audio_guidance_scale * (audio - prompt)
        latents = latents + velocity * float(after - now)
    return latents


def torch_networks(networks):
    """Each network in PyTorch, with the weights that ours have."""
    import transformers
    from diffusers import AutoencoderKLWan

    config = networks.config
    text, image, speech = config.text_encoder, config.image_encoder, config.speech_encoder
    encoder = transformers_umt5(text)
    state = to_torch(networks["text_encoder"], umt5.transformers_rules(text))
    encoder.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})

    tower = transformers_clip_vision(image)
    # transformers has a last block too, and a norm after it; neither is used.
    rules = clip_vision.transformers_rules(image)
    assert not tower.load_state_dict(to_torch(networks["image_encoder"], rules), strict=False).unexpected_keys

    speech_encoder = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**asdict(speech)))
    state = to_torch(networks["speech_encoder"], wav2vec2.official_rules(speech))
    faults = speech_encoder.load_state_dict(state, strict=False)
    assert (faults.missing_keys, faults.unexpected_keys) == (["masked_spec_embed"], [])

    autoencoder = AutoencoderKLWan(base_dim=config.vae.dim, z_dim=config.vae.latent_channels)
    autoencoder.load_state_dict(to_torch(networks["vae"], vae.diffusers_rules(config.vae)))

    transformer = networks["transformer"]
    adapter = transformer.adapters.pop("audio")
    weights = to_torch(transformer, wan.official_rules(config.transformer))
    audio_weights = to_torch(adapter, wan.audio_adapter_rules(config.audio_adapter))
    for module in (encoder, tower, speech_encoder, autoencoder):
        module.eval().requires_grad_(False)
    return (
        encoder,
        tower,
        speech_encoder,
        autoencoder,
        TorchTransformer(config.transformer, weights, audio_weights),
    )


@pytest.fixture(scope="module")
def system():
    """Sizes, settings of sampling, and the clip's geometry."""
    config = load_config(DEBUG)
    model, settings = build(ModelConfig, config.model, "model"), build(SampleConfig, config.sample, "sample")
    return model, settings, build(VideoConfig, config.video, "video")


@pytest.fixture(scope="module")
def networks(system):
    """The networks of this project."""
    return Networks(system[0], RandomisedLoader(), byte_tokenizer)


@pytest.fixture(scope="module")
def weights(networks, files, tmp_path_factory):
    """Their store, with the tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    for slot, config in networks.config.networks.items():
        save_network(folder / slot, networks[slot], component=component_of(config).name)
    shutil.copytree(files / "tokenizer", folder / "text_encoder" / TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def torch_parts(files, networks, system):
    """PyTorch's transformer and what it samples from."""
    _, settings, video = system
    encoder, tower, speech_encoder, autoencoder, transformer = torch_networks(networks)
    num_frames = video.num_frames
    pixels = torch_image(files / "face.png", video.longest_edge)
    return transformer, {
        "prompt": torch_text(encoder, files / "tokenizer", PROMPT),
        "negative": torch_text(encoder, files / "tokenizer", settings.negative_prompt),
        "image": torch_clip(tower, pixels),
        "audio": torch_speech(speech_encoder, files / "voice.wav", num_frames / video.fps),
        "first_frame": torch_first_frame(autoencoder, pixels, num_frames),
        "noise": from_file(files / "noise.safetensors", "noise"),
    }


@pytest.fixture(scope="module")
def expected(torch_parts, system):
    """The latents that PyTorch ends with."""
    transformer, inputs = torch_parts
    return torch_sample(transformer, inputs, system[1], system[2].num_frames)


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


def test_latents_are_those_of_pytorch(files, weights, expected, tmp_path, capsys):
    with jax.default_matmul_precision("highest"):
        main(command(files, weights, tmp_path / "video.mp4"))
    assert "random" not in capsys.readouterr().out
    difference = relative(from_file(tmp_path / "video.safetensors", "latents"), expected)
    with capsys.disabled():
        print(f" [{difference:.1e}]", end="")
    assert difference < 1e-5


@pytest.mark.parametrize("name", ["prompt", "negative", "image", "audio", "first_frame", "noise"])
def test_every_input_is_seen_in_the_latents(torch_parts, expected, system, name):
    """The contribution of each input is far above the limit, so that an error in it would show."""
    transformer, inputs = torch_parts
    changed = inputs | {name: inputs[name].flip(-1)}
    sampled = torch_sample(transformer, changed, system[1], system[2].num_frames)
    assert relative(sampled, expected) > 1e-3


def cut_off(folder):
    """Takes a byte from one of the files that hold the VAE."""
    largest = max(
        (path for path in folder.rglob("vae/**/*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_off, "vae"),
        (lambda folder: (folder / "vae/component.json").unlink(), "vae"),
    ],
)
def test_damaged_weights_are_one_line(files, weights, tmp_path, monkeypatch, capsys, harm, message):
    harmed = shutil.copytree(weights, tmp_path / "weights")
    harm(harmed)
    arguments = command(files, harmed, tmp_path / "video.mp4")
    assert message in refused(tmp_path, monkeypatch, capsys, arguments)
    assert not list(tmp_path.glob("video*"))


def test_weights_of_another_model_are_refused(files, weights, tmp_path, monkeypatch, capsys):
    other = "--config.model.text_encoder.num_layers=3"
    arguments = [*command(files, weights, tmp_path / "video.mp4"), other]
    error = refused(tmp_path, monkeypatch, capsys, arguments)
    assert "num_layers" in error
