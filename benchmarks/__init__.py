"""Thin scripts on top of the library: load, call, save."""
