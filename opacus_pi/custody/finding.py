"""What a probe has found out about one link of the chain of custody."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """The state of a link, with what was seen.

    Args:
        state: ``"checked"``: it was seen to hold; ``"unchecked"``: it could not be
            seen; ``"broken"``: it does not hold.
        sentence: What was seen, why nothing could be seen, or what is wrong and what to
            do, in sentences.
    """

    state: Literal["checked", "unchecked", "broken"]
    sentence: str
