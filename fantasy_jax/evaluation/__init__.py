"""Metrics: how good what was made is."""
