"""What the transformer's cross-attention can listen to besides text and picture."""
