"""Preprocessing of images, audio, text, faces and bodies."""
