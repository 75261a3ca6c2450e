"""Weights between PyTorch's files and the networks here."""
