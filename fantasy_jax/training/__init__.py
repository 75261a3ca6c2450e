"""Training: objective, stages, optimizer, loop and checkpoints."""
