"""Files on disk: safetensors, checksums, kinds, versions, atomic replacement.

Nothing here is promised to users: ledgers, weights and reports have their own functions
for saving and loading.
"""

__all__: list[str] = []
