"""What the parts of our engine may take for granted: they are mixed into Opacus's."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opacus import PrivacyEngine as Engine
else:
    Engine = object

__all__ = ["Engine"]
