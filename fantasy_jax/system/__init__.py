"""What a system consists of: its networks, and what a clip is conditioned on."""
