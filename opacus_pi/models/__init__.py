"""Run a torch model without changing it: copies, batches, losses and predictions."""
