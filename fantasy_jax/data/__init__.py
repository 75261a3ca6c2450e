"""Records, the loader, and the encoding of clips."""
