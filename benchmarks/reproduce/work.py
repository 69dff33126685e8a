"""How much a job does, counted before it is run."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Work:
    """Examples that pass through a model, each pass counted.

    Attributes:
        trained: Forward and backward, in training.
        unlearned: The same, in unlearning; every method counted as fine-tuning.
        swept: For their gradient norms.
        evaluated: Forward only.
    """

    trained: int = 0
    unlearned: int = 0
    swept: int = 0
    evaluated: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * getattr(self, one.name) for one in fields(self)))
