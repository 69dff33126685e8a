"""Permutation symmetries of networks: tracing, matching, and loss barriers."""
