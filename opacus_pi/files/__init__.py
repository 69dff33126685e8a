"""Files on disk: safetensors, checksums, kinds, versions, atomic replacement.

Everything here is private and may change: ledgers, weights and reports have their own
functions for saving and loading.
"""

__all__: list[str] = []
