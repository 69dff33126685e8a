"""Loops of distributed training, and what two processes of one run say about each."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from opacus_pi.recording import AccountingError
from tests import distributed_training
from tests.distributed_training import NUM_PROCESSES


def trained_on(loss, change=None, after=None):
    """Return a loop.

    Args:
        loss: ``(criterion, outputs, targets) -> loss``.
        change: Called with the run after each backward pass.
        after: Called with the run after each step.
    """

    def train(run):
        for inputs, labels in run.loader:
            run.optimizer.zero_grad()
            outputs = run.model(inputs)
            loss(run.criterion, outputs, labels).backward()
            if change is not None:
                change(run)
            run.optimizer.step()
            if after is not None:
                after(run)

    return train


def plain(criterion, outputs, labels):
    return criterion(outputs, labels)


def hardest_half(_, outputs, labels):
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def rolled(criterion, outputs, labels):
    return criterion(outputs, labels.roll(1))


def centred(criterion, outputs, labels):
    return criterion(outputs - outputs.mean(0), labels)


def inverse(criterion, outputs, labels):
    losses = F.cross_entropy(outputs.detach(), labels, reduction="none")
    return criterion(outputs, labels) * float(1 / losses.mean().clamp(min=1e-3))


def gradients_normalised(run):
    for p in run.module.parameters():
        p.grad_sample = p.grad_sample / p.grad_sample.norm()


def gradients_doubled(run):
    for p in run.module.parameters():
        p.grad_sample.mul_(2)


def gradients_doubled_on_one(run):
    if dist.get_rank() == 1:
        gradients_doubled(run)


def sums_scaled(run):
    for p in run.module.parameters():
        p.grad.mul_(10)


def weights_clamped(run):
    for p in run.module.parameters():
        p.data.clamp_(-0.1, 0.1)


LOOPS = {
    "plain": trained_on(plain),
    "hardest half": trained_on(hardest_half),
    "rolled": trained_on(rolled),
    "centred": trained_on(centred),
    "inverse": trained_on(inverse),
    "gradients normalised": trained_on(plain, gradients_normalised),
    "gradients doubled": trained_on(plain, gradients_doubled),
    "gradients doubled on one": trained_on(plain, gradients_doubled_on_one),
    "sums scaled": trained_on(plain, sums_scaled),
    "weights clamped": trained_on(plain, after=weights_clamped),
}
# by wrapper and mode: the loops
CASES = {
    ("dpddp", "hooks"): [n for n in LOOPS if n != "sums scaled"],
    ("ddp", "hooks"): ["plain"],
    ("dpddp", "ghost"): [n for n in LOOPS if not n.startswith("gradients")],
}


def outcome(wrapper, mode, name, *, is_audited):
    """Train by a loop; return what is refused, said, and in the ledger."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make = getattr(distributed_training, wrapper)
        run = make(grad_sample_mode=mode)
        passed = None
        if is_audited:
            passed = run.engine.audit(distributed_training.CRITERION).passed
        LOOPS[name](run)
        run.recorder.merge()
        try:
            links = run.engine.ledger.custody.links
            states, refusal = {link.name: link.state for link in links}, ""
        except AccountingError as error:
            states, refusal = {}, str(error)
    said = [str(w.message) for w in caught if "without a check" in str(w.message)]
    return {"refusal": refusal, "said": said, "states": states, "passed": passed}


def process(rank, folder):
    """All cases in one process."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    init = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init, rank=rank, world_size=NUM_PROCESSES)
    torch.manual_seed(100 + rank)
    results = {
        (*case, name, is_audited): outcome(*case, name, is_audited=is_audited)
        for case, names in CASES.items()
        for name in names
        for is_audited in (False, True)
    }
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # the group cannot be left in order any more
