"""Pipelines that users call from Python."""
