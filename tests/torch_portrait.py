"""FantasyPortrait in PyTorch, the reference of `test_end_to_end_portrait`.

The expression adapter, the masks of several people and the guidance are written here, after fantasy-portrait,
`diffsynth/pipelines/wan_video.py`, `diffsynth/models/wan_video_dit.py`, `infer_multi.py` and `utils.py`.
Everything else is FantasyTalking's (`torch_system`). Latents are `[1, C, F, h, w]`.
"""

import torch
from helpers import to_torch
from test_motion_encoder import torch_encoder
from torch.nn import functional
from torch_resampler import TorchResampler
from torch_system import TorchTransformer, euler, torch_encoders, windows_of

from fantasy_jax.convert import motion_encoder, portrait, wan

PARTS = ("headpose", "eye", "emo", "mouth")


def encode_motion(encoder, faces):
    """Features of uint8 faces, `[P, T, M]`."""
    pixels = torch.tensor(faces).permute(0, 1, 4, 2, 3).float() / 255 * 2 - 1
    return encoder(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])


def growth_of(boxes):
    """How far a driving face leaves its first box to the left, top, right and bottom, at most a quarter."""
    left, top, right, bottom = boxes[0]
    width, height = right - left, bottom - top
    grown = (
        (left - min(boxes[:, 0])) / width,
        (top - min(boxes[:, 1])) / height,
        (max(boxes[:, 2]) - right) / width,
        (max(boxes[:, 3]) - bottom) / height,
    )
    return [min(x, 0.25) for x in grown]


def token_labels(boxes, driving_boxes, height, width, num_frames):
    """The label of every video token, `[F, S]`; boxes go from left to right, as their drivers do."""
    video = torch.zeros(num_frames, height, width)
    for label, (box, driving) in enumerate(zip(boxes, driving_boxes, strict=True), 1):
        left, top, right, bottom = (int(x) for x in box)
        growth = growth_of(driving)
        across, down = right - left, bottom - top
        left, right = int(left - growth[0] * across), int(right + growth[2] * across)
        top, bottom = int(top - growth[1] * down), int(bottom + growth[3] * down)
        video[:, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)] = label
    first = functional.max_pool2d(video[None, :1], 16)
    others = functional.max_pool3d(video[None, None, 1:], (4, 16, 16))[0]
    return torch.cat([first, others], dim=1)[0].flatten(1)


def official_attention(windows, labels):
    """What the official script attends to: the last person's tokens first, and blocks of other labels.

    Args:
        windows: Tokens of each person and latent frame, `[P, F, L, C]`.
        labels: `[F, S]`.

    Returns:
        Tokens `[F, P L, C]`, and a mask `[F, S, P L]`, true where a video token attends to a token.
    """
    people, _, length, _ = windows.shape
    blocks = torch.arange(1, people + 1).repeat_interleave(length)
    return torch.cat(list(windows.flip(0)), dim=1), labels[..., None] != blocks


def right_attention(windows, labels):
    """What each person should attend to: their own tokens, and the background to everybody's."""
    people, _, length, _ = windows.shape
    blocks = torch.arange(1, people + 1).repeat_interleave(length)
    mask = (labels[..., None] == 0) | (labels[..., None] == blocks)
    return torch.cat(list(windows), dim=1), mask


class TorchPortraitTransformer(TorchTransformer):
    """The transformer and the expression adapter."""

    def __init__(self, config, weights, adapter_config, adapter_weights):
        """Keeps the weights; configs are ours."""
        super().__init__(config, weights, adapter_weights)
        self.part_widths = adapter_config.part_widths
        self.resamplers = {
            part: self.resampler(adapter_config, part, width, queries)
            for part, width, queries in (
                ("mouth", adapter_config.mouth_width, adapter_config.mouth_queries),
                ("emo", adapter_config.emotion_width, adapter_config.emotion_queries),
            )
        }

    def resampler(self, config, part, width, queries):
        module = TorchResampler(config.resampler, width, queries, config.token_width)
        prefix = f"{part}_proj_model."
        module.load_state_dict(
            {k.removeprefix(prefix): x for k, x in self.adapter_weights.items() if k.startswith(prefix)}
        )
        return module.requires_grad_(False)

    def windows(self, features, num_frames):
        """Windows of each person's tokens, `[P, F, 97, C]`; their padding is attended to as it is."""
        parts = dict(zip(PARTS, features.split(self.part_widths, dim=-1), strict=True))
        tokens = [self.raw_token(name, part) for name, part in parts.items()]
        for name, resampler in self.resamplers.items():
            part = parts[name].flatten(0, 1)[:, None]
            tokens.append(resampler(part).unflatten(0, features.shape[:2]))
        people = torch.cat(tokens, dim=2).flatten(1, 2)
        return torch.stack([windows_of(tokens[None], num_frames, expand=0)[0] for tokens in people])

    def raw_token(self, name, part):
        token = functional.linear(part, self.adapter_weights[f"proj_model.{name}_proj.weight"])
        scale, shift = (self.adapter_weights[f"proj_model.norm.{x}"] for x in ("weight", "bias"))
        return functional.layer_norm(token, token.shape[-1:], scale, shift)[:, :, None]

    def attend_to_adapter(self, block, q, adapted):
        """Expression attention of one block, each latent frame to its own tokens."""
        tokens, mask, ip_scale = adapted
        name = f"ip_adapter.{block}.cross_attn.processor.ip_adapter_single_stream"
        key, value = (
            functional.linear(tokens, self.adapter_weights[f"{name}_{x}_proj.weight"]) for x in "kv"
        )
        frames = q.unflatten(1, (len(tokens), -1))[0]
        attended = self.attend(frames, key, value, None if mask is None else mask[:, None])
        return attended.flatten(0, 1)[None] * ip_scale


def sample(transformer, inputs, attended, *, cfg_scale, portrait_scale, num_steps, shift):
    """Guided Euler steps.

    Args:
        transformer: A TorchPortraitTransformer.
        inputs: Prompts, image, first frame and noise.
        attended: Tokens of all people and a mask (None: everything is attended to).
        cfg_scale: Guidance scale of the prompt; with 1 there is no negative prompt, and there are two passes.
        portrait_scale: Guidance scale of the expression.
        num_steps: Steps.
        shift: Shift of the noise schedule.
    """

    def branch(text, ip_scale):
        return transformer.conditions(inputs[text], inputs["image"], (*attended, ip_scale))

    full, without = branch("prompt", 1.0), branch("prompt", 0.0)
    negative = branch("negative", 0.0) if cfg_scale != 1 else None

    def velocity(latents, timestep):
        def run(branch):
            return transformer.velocity(latents, inputs["first_frame"], timestep, branch)

        expression, plain = run(full), run(without)
        guided = portrait_scale * (expression - plain)
        if negative is None:
            return plain + guided
        opposite = run(negative)
        return opposite + cfg_scale * (plain - opposite) + guided

    return euler(velocity, inputs["noise"], num_steps, shift)


def torch_networks(networks):
    """Each network in PyTorch by slot, with the weights that ours have."""
    config = networks.config
    encoder = torch_encoder(config.motion_encoder)
    rules = motion_encoder.official_rules(config.motion_encoder)
    encoder.load_state_dict(to_torch(networks["motion_encoder"], rules))
    transformer = networks["transformer"]
    adapter = transformer.adapters.pop("expression")
    weights = to_torch(transformer, wan.official_rules(config.transformer))
    adapter_weights = to_torch(adapter, portrait.official_rules(config.expression_adapter))
    return torch_encoders(networks) | {
        "motion_encoder": encoder.eval().requires_grad_(False),
        "transformer": TorchPortraitTransformer(
            config.transformer, weights, config.expression_adapter, adapter_weights
        ),
    }
