"""Data, models, training and reports that several benchmarks share."""
