"""What the processes of a distributed run tell each other for one record of all.

Every method is collective: all processes must call it, in the same order.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Processes"]


class Processes:
    """The processes of torch's default group.

    Attributes:
        rank: Which of them this one is.
        size: How many there are.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        on_cpu = "gloo" in str(dist.get_backend()) or not torch.cuda.is_available()
        self._device = torch.device("cpu" if on_cpu else "cuda")

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Each process's rows, in the order of their ranks.

        Args:
            rows: ``(k, c)`` on the CPU; k may differ from process to process.
        """
        length = torch.tensor([len(rows)], device=self._device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = int(torch.cat(lengths).max())
        padded = rows.new_zeros(longest, rows.shape[1], device=self._device)
        padded[: len(rows)] = rows.to(self._device)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        pairs = zip(gathered, lengths, strict=True)
        return [part[: int(length)].cpu() for part, length in pairs]

    def gather_texts(self, text: str) -> list[str]:
        """Each process's text, in the order of their ranks."""
        texts = [""] * self.size
        dist.all_gather_object(texts, text)
        return texts

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of values on the CPU, all of one shape."""
        total = values.to(self._device, copy=True)
        dist.all_reduce(total)
        return total.cpu()
