"""Networks: architecture only, nothing of training, files or flags."""
