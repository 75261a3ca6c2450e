"""Talking and acting portraits in JAX: FantasyTalking on the Wan2.1 video diffusion transformer."""

__version__ = "0.1.0"
