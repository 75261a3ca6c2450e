"""Training: what is stepped, how, and how nothing of it is lost."""
