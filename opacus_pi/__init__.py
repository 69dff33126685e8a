"""Per-instance privacy accounting and unlearning for Opacus."""
