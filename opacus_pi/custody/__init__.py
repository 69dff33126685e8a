"""The chain of custody: what is known about where the norms of an update come from.

Each file watches one link. Nothing here knows Opacus: ``opacus_pi.integration`` tells
the links what its optimizers and loaders do.
"""

__all__: list[str] = []
