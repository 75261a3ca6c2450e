"""The store of weights: import, export, download, inspect."""
