"""What everything costs: ours, its bar, and every peer that is installed."""
