"""The miniature: a synthetic world, the training of a small system on it, and its measurements."""
