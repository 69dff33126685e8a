"""Tests on a torch device that is not the CPU, without a GPU."""
