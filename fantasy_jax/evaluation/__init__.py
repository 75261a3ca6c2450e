"""Metrics of any video: mouth opening, motion, agreement with the audio, image differences."""
