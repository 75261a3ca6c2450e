"""Adapters: what the transformer can also be conditioned on."""
