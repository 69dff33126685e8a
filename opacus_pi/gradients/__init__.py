"""Per-example gradient norms without per-example gradients."""
