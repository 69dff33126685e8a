"""Time and memory of everything that grows with the number of examples."""
