"""The result of a probe of one link of the chain of custody."""

from dataclasses import dataclass
from typing import Literal

from opacus_pi.custody.chain import Chain

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """The state of a link, with the observation that shows it.

    Args:
        state: ``"checked"``: it was seen to hold; ``"unchecked"``: it could not be
            seen; ``"broken"``: it does not hold.
        sentence: What was seen, why nothing could be seen, or what is wrong and what to
            do, in sentences.
    """

    state: Literal["checked", "unchecked", "broken"]
    sentence: str

    def tell(self, chain: Chain, link: str) -> None:
        """Report the finding to a chain of custody.

        Args:
            chain: The chain of the run.
            link: The link that was looked at.
        """
        if self.state == "checked":
            chain.check(link, self.sentence)
        elif self.state == "unchecked":
            chain.leave_unchecked(link, self.sentence)
        else:
            chain.break_link(link, self.sentence)
