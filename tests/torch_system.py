"""FantasyTalking in PyTorch, the reference of `test_end_to_end`; `torch_portrait` shares its parts.

The encoders are those of transformers, and the VAE is that of diffusers. The transformer with its audio
adapter is written here, after Wan2.1, `wan/modules/model.py`, and fantasy-talking, `model.py`; it computes
from the official state dicts. Latents are `[1, C, F, h, w]`.
"""

import html
import re
import wave
from dataclasses import asdict
from itertools import pairwise

import ftfy
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKLWan
from helpers import to_torch, transformers_clip_vision, transformers_umt5
from PIL import Image
from torch.nn import functional

from fantasy_jax.convert import clip_vision, umt5, vae, wan, wav2vec2


def encode_text(encoder, folder, prompt):
    """The tokens of a prompt, padded with zeros to 512: `[1, 512, C]`."""
    cleaned = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(
        re.sub(r"\s+", " ", cleaned),
        padding="max_length",
        truncation=True,
        max_length=512,
        return_tensors="pt",
    )
    hidden = encoder(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    return torch.where(inputs.attention_mask[..., None].bool(), hidden, 0)


def read_image(path, longest_edge):
    """Pixels in [-1, 1], `[3, H, W]`."""
    image = Image.open(path).convert("RGB")
    scale = longest_edge / max(image.size)
    image = image.resize(tuple(int(side * scale) for side in image.size), Image.LANCZOS)
    image = image.resize(tuple((side + 15) // 16 * 16 for side in image.size))
    return torch.tensor(np.array(image, np.float32) * (2 / 255) - 1).permute(2, 0, 1)


def encode_image(encoder, pixels):
    """CLIP's features of the last block but one."""
    size = encoder.config.image_size
    small = functional.interpolate(pixels[None], (size, size), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return encoder((small * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states[-2]


def encode_audio(encoder, path, seconds):
    """wav2vec2's last hidden state of the clip's audio."""
    with wave.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    cut = samples[: int(seconds * 16_000)]
    extractor = transformers.Wav2Vec2FeatureExtractor()
    return encoder(extractor(cut, sampling_rate=16_000, return_tensors="pt").input_values).last_hidden_state


def encode_first_frame(autoencoder, pixels, num_frames):
    """The mask, and the normalised latents of the image followed by grey frames."""
    grey = torch.zeros(3, num_frames - 1, *pixels.shape[1:])
    video = torch.cat([pixels[:, None], grey], dim=1)[None]
    config = autoencoder.config
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (config.latents_mean, config.latents_std))
    latents = (autoencoder.encode(video).latent_dist.mode() - mean) / std
    mask = torch.zeros(1, 4, *latents.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


def windows_of(tokens, num_frames, expand):
    """The tokens that each latent frame attends to, `[F, L, C]`, and how many are not padding."""
    per_frame = tokens.shape[1] / num_frames
    half = int(per_frame * 4 / 2)
    ends = [per_frame * (4 * i + 1) for i in range(num_frames // 4 + 1)]
    centres = [int((a + b) / 2) - 1 for a, b in pairwise(ends)]
    first = centres[0] - half
    ranges = [(first - 2 * half, first), *((centre - half, centre + half) for centre in centres)]
    windows, lengths = [], []
    for start, end in ranges:
        window = tokens[0, max(start - expand, 0) : end + expand + 1]
        lengths.append(len(window))
        missing = 2 * (half + expand) + 1 - len(window)
        windows.append(functional.pad(window, (0, 0, 0, missing)))
    return torch.stack(windows), lengths


class TorchTransformer:
    """The transformer and an adapter, computed from their official state dicts."""

    def __init__(self, config, weights, adapter_weights):
        """Keeps the weights; `config` is our WanConfig."""
        self.config = config
        self.weights = weights
        self.adapter_weights = adapter_weights

    def linear(self, key, x):
        return functional.linear(x, self.weights[f"{key}.weight"], self.weights.get(f"{key}.bias"))

    def layer_norm(self, x, key=None, epsilon=1e-6):
        scale, shift = (self.weights[f"{key}.{part}"] for part in ("weight", "bias")) if key else (None, None)
        return functional.layer_norm(x, x.shape[-1:], scale, shift, epsilon)

    def rms_norm(self, key, x):
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{key}.weight"], 1e-6)

    def attend(self, q, k, v, mask=None):
        """Attention of `[B, L, D]`, which are split into heads; the mask is the same for all of them."""
        q, k, v = (x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)

    def rotate(self, x, grid):
        """Rotary positions over frames, rows and columns, as complex numbers of float64."""
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

    def conditions(self, text, image, adapted):
        """Tokens of text and image; and what the adapter's attention takes, None for a branch without it."""
        text = self.linear("text_embedding.0", text)
        text = self.linear("text_embedding.2", functional.gelu(text, approximate="tanh"))
        image = self.linear("img_emb.proj.1", self.layer_norm(image, "img_emb.proj.0", 1e-5))
        image = self.layer_norm(self.linear("img_emb.proj.3", functional.gelu(image)), "img_emb.proj.4", 1e-5)
        return text, image, adapted

    def attend_to_adapter(self, block, q, adapted):
        """The adapter's attention in one block."""
        raise NotImplementedError

    def block(self, name, x, time, grid, text, image, adapted):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            self.weights[f"{name}.modulation"] + time
        ).chunk(6, 1)
        modulated = self.layer_norm(x) * (1 + scale) + shift
        attention = f"{name}.self_attn"
        q, k = (
            self.rotate(
                self.rms_norm(f"{attention}.norm_{part}", self.linear(f"{attention}.{part}", modulated)), grid
            )
            for part in "qk"
        )
        attended = self.attend(q.flatten(2), k.flatten(2), self.linear(f"{attention}.v", modulated))
        x = x + self.linear(f"{attention}.o", attended) * gate

        attention = f"{name}.cross_attn"
        q = self.linear(f"{attention}.q", self.layer_norm(x, f"{name}.norm3"))
        q = self.rms_norm(f"{attention}.norm_q", q)
        attended = 0
        for suffix, tokens in (("", text), ("_img", image)):
            k = self.rms_norm(f"{attention}.norm_k{suffix}", self.linear(f"{attention}.k{suffix}", tokens))
            attended = attended + self.attend(q, k, self.linear(f"{attention}.v{suffix}", tokens))
        if adapted is not None:
            attended = attended + self.attend_to_adapter(name, q, adapted)
        x = x + self.linear(f"{attention}.o", attended)

        hidden = self.linear(f"{name}.ffn.0", self.layer_norm(x) * (1 + mlp_scale) + mlp_shift)
        hidden = functional.gelu(hidden, approximate="tanh")
        return x + self.linear(f"{name}.ffn.2", hidden) * mlp_gate

    def velocity(self, latents, first_frame, timestep, conditions):
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


class TorchTalkingTransformer(TorchTransformer):
    """The transformer and the audio adapter."""

    def windows(self, audio, num_frames):
        """Windows of the audio tokens, and their lengths."""
        weights = self.adapter_weights
        tokens = functional.linear(audio, weights["proj_model.proj.weight"])
        scale, shift = weights["proj_model.norm.weight"], weights["proj_model.norm.bias"]
        tokens = functional.layer_norm(tokens, tokens.shape[-1:], scale, shift)
        return windows_of(tokens, num_frames, expand=4)

    def attend_to_adapter(self, block, q, adapted):
        """Audio attention of one block, frame by frame."""
        windows, lengths = adapted
        name = f"audio_processor.{block}.cross_attn.processor"
        attended = []
        for frame, window, length in zip(q.chunk(len(lengths), dim=1), windows, lengths, strict=True):
            key, value = (
                functional.linear(window[None, :length], self.adapter_weights[f"{name}.{part}_proj.weight"])
                for part in "kv"
            )
            attended.append(self.attend(frame, key, value))
        return torch.cat(attended, dim=1)


def euler(velocity, noise, num_steps, shift):
    """Euler steps along `velocity`, a function of latents and timestep."""
    sigmas = np.linspace(1, 0, num_steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    latents = noise
    for now, after in pairwise(sigmas):
        latents = latents + velocity(latents, float(np.float32(now * 1000))) * float(after - now)
    return latents


def sample(transformer, inputs, config, num_frames):
    """Guided Euler steps, with the settings of a SampleConfig."""
    audio = transformer.windows(inputs["audio"], num_frames)
    branches = [
        transformer.conditions(inputs[text], inputs["image"], adapted)
        for text, adapted in (("negative", None), ("prompt", None), ("prompt", audio))
    ]

    def velocity(latents, timestep):
        negative, no_audio, full = (
            transformer.velocity(latents, inputs["first_frame"], timestep, branch) for branch in branches
        )
        guided = negative + config.text_guidance_scale * (no_audio - negative)
        return guided + config.audio_guidance_scale * (full - no_audio)

    return euler(velocity, inputs["noise"], config.num_inference_steps, config.shift)


def torch_networks(networks):
    """Each network in PyTorch by slot, with the weights that ours have."""
    config = networks.config
    speech = config.speech_encoder
    speech_encoder = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**asdict(speech)))
    state = to_torch(networks["speech_encoder"], wav2vec2.official_rules(speech))
    faults = speech_encoder.load_state_dict(state, strict=False)
    assert (faults.missing_keys, faults.unexpected_keys) == (["masked_spec_embed"], [])
    transformer = networks["transformer"]
    adapter = transformer.adapters.pop("audio")
    weights = to_torch(transformer, wan.official_rules(config.transformer))
    audio_weights = to_torch(adapter, wan.audio_adapter_rules(config.audio_adapter))
    return torch_encoders(networks) | {
        "speech_encoder": speech_encoder.eval().requires_grad_(False),
        "transformer": TorchTalkingTransformer(config.transformer, weights, audio_weights),
    }


def torch_encoders(networks):
    """The networks in PyTorch that encode text and image, by slot."""
    config = networks.config
    text, image = config.text_encoder, config.image_encoder
    text_encoder = transformers_umt5(text)
    state = to_torch(networks["text_encoder"], umt5.transformers_rules(text))
    text_encoder.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})

    image_encoder = transformers_clip_vision(image)
    # transformers also has the last block and a norm behind it, whose outputs are not used.
    state = to_torch(networks["image_encoder"], clip_vision.transformers_rules(image))
    assert not image_encoder.load_state_dict(state, strict=False).unexpected_keys

    autoencoder = AutoencoderKLWan(base_dim=config.vae.dim, z_dim=config.vae.latent_channels)
    autoencoder.load_state_dict(to_torch(networks["vae"], vae.diffusers_rules(config.vae)))
    encoders = {"text_encoder": text_encoder, "image_encoder": image_encoder, "vae": autoencoder}
    return {slot: encoder.eval().requires_grad_(False) for slot, encoder in encoders.items()}
