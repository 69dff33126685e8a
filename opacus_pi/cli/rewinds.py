"""Saved states and deletion policies that are named on the command line.

``plan`` and ``unlearn`` take the same two arguments: ``--checkpoints`` names the
directory that a recorder wrote, and ``--policy`` asks for a filtered rewind by the
policy that was fixed before training. Nothing is trained or written here.
"""

import argparse
from typing import Any

from opacus_pi.cli.errors import BadInput, about
from opacus_pi.recording.checkpoints import Checkpoints, policy_in


def rewind_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a rewind, or an empty dict if no states are named.

    Args:
        options: The parsed arguments, with ``checkpoints`` and ``use_policy``.

    Returns:
        ``checkpoints`` and ``deletion_policy``, as ``Unlearner.rewind`` takes them.

    Raises:
        BadInput: If the directory has no states, or a policy is asked for and there is
            none.
    """
    if options.checkpoints is None:
        return {}
    with about("--checkpoints", "Name the directory that the Recorder wrote."):
        states = Checkpoints(options.checkpoints)
        policy = policy_in(states.record.policy)
    if options.use_policy and policy is None:
        raise BadInput(
            "--policy: the training had no deletion policy, and one that is made "
            "later proves nothing. Leave --policy out for an exact rewind."
        )
    used = policy if options.use_policy else None
    return {"checkpoints": states, "deletion_policy": used}
