"""Gradient norm rules, one file for each layer type."""
