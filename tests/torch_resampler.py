"""IP-Adapter's Perceiver resampler in PyTorch, as FantasyPortrait has it, with the official names."""

import torch
from torch import nn


class PerceiverAttention(nn.Module):
    """Attention of the queries to the input and to themselves."""

    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, latents):
        x, latents = self.norm1(x), self.norm2(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        scale = q.shape[-1] ** -0.25
        weights = ((q * scale) @ (k * scale).transpose(2, 3)).float().softmax(dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class TorchResampler(nn.Module):
    """Turns a sequence into a fixed number of tokens."""

    def __init__(self, config, input_width, num_queries, output_width):
        """Builds it; `config` is our ResamplerConfig."""
        super().__init__()
        dim, hidden = config.dim, config.mlp_ratio * config.dim
        self.latents = nn.Parameter(torch.randn(1, num_queries, dim) / dim**0.5)
        self.proj_in, self.proj_out = nn.Linear(input_width, dim), nn.Linear(dim, output_width)
        self.norm_out = nn.LayerNorm(output_width)
        self.layers = nn.ModuleList()
        for _ in range(config.depth):
            attention = PerceiverAttention(dim, config.num_heads, config.head_dim)
            widen, narrow = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
            mlp = nn.Sequential(nn.LayerNorm(dim), widen, nn.GELU(), narrow)
            self.layers.append(nn.ModuleList([attention, mlp]))

    def forward(self, x):
        latents, x = self.latents.expand(len(x), -1, -1), self.proj_in(x)
        for attention, mlp in self.layers:
            latents = attention(x, latents) + latents
            latents = mlp(latents) + latents
        return self.norm_out(self.proj_out(latents))
