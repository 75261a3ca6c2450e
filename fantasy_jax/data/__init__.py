"""What networks are fed, made from pictures, sound and text."""
