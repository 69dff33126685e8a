"""Files on disk: safetensors, checksums, kinds, versions, atomic replacement."""
