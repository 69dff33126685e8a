"""How noisy fine-tuning contracts a divergence (Corollaries 4.1 and 4.4)."""

__all__: list[str] = []
