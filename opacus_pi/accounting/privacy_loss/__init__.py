"""Each example's Renyi privacy loss over a run, from its ledger."""

from opacus_pi.accounting.privacy_loss.per_instance import (
    per_step_losses,
    privacy_losses,
    worst_case_loss,
)

__all__ = ["per_step_losses", "privacy_losses", "worst_case_loss"]
