"""Verification against outputs of the PyTorch modules."""
