"""Readers of weight files, and the tables and rules that map their keys to our parameters."""
