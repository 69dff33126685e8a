"""Make a trained model forget: methods, the loop that runs them, what they prove.

``Unlearner`` runs a method on a copy of a model. ``DeletionRequests`` keeps the
requests about a model in a tamper-evident log and carries each out once. The methods in
``rivals`` use the forget set, as many published ones do; they are for comparison.

| question | file |
|---|---|
| what does one update do? | ``methods``, ``rivals`` |
| in which order, and when does it end? | ``loop``, ``unlearner`` |
| what happens meanwhile, and after a crash? | ``callbacks``, ``resuming`` |
| what may be claimed afterwards? | ``claims``, ``history`` |
| how long will it take? | ``plan``, ``search`` |
| how far must a training run go back? | ``rewind`` |
| who asked for it, and was it done? | ``requests``, ``deletion_log`` |
| what is pending? | ``listed_requests``, ``next_run`` |
| how is a result kept? | ``saved_result`` |
| what may be shown to others? | ``log_export``, ``deletion_statements`` |

>>> import torch
>>> data_set = torch.utils.data.TensorDataset(torch.randn(8, 2), torch.arange(8) % 3)
>>> criterion = torch.nn.CrossEntropyLoss()
>>> unlearner = Unlearner(torch.nn.Linear(2, 3), criterion=criterion)
>>> result = unlearner.unlearn(data_set, forget_indices=[0, 5], num_epochs=2)
>>> result.record["forget_indices"], result.record["num_steps"]
([0, 5], 2)
"""

from opacus_pi._promised import promise
from opacus_pi.unlearning.callbacks import Callback, LogMetrics
from opacus_pi.unlearning.deletion_log import DeletionLog
from opacus_pi.unlearning.deletion_statements import (
    DeletionStatement,
    deletion_statement,
)
from opacus_pi.unlearning.json_lines_log import import_log
from opacus_pi.unlearning.listed_requests import ListedRequest, list_requests
from opacus_pi.unlearning.log_export import (
    export_log,
    exported_entries,
    verify_export,
)
from opacus_pi.unlearning.loop import StopAtPlateau, StopWhen
from opacus_pi.unlearning.methods import (
    FineTune,
    L1Sparse,
    Langevin,
    Method,
    Task,
    mean_loss,
)
from opacus_pi.unlearning.plan import Plan
from opacus_pi.unlearning.requests import DeletionRequest, DeletionRequests
from opacus_pi.unlearning.rewind_plan import RewindPlan
from opacus_pi.unlearning.rivals import (
    SCRUB,
    SSD,
    NegGradPlus,
    RandomLabels,
    SalUn,
)
from opacus_pi.unlearning.saved_result import (
    SavedResult,
    load_result,
    save_result,
)
from opacus_pi.unlearning.unlearner import Unlearner, UnlearningResult

__all__ = [
    "SCRUB",
    "SSD",
    "Callback",
    "DeletionLog",
    "DeletionRequest",
    "DeletionRequests",
    "DeletionStatement",
    "FineTune",
    "L1Sparse",
    "Langevin",
    "ListedRequest",
    "LogMetrics",
    "Method",
    "NegGradPlus",
    "Plan",
    "RandomLabels",
    "RewindPlan",
    "SalUn",
    "SavedResult",
    "StopAtPlateau",
    "StopWhen",
    "Task",
    "Unlearner",
    "UnlearningResult",
    "deletion_statement",
    "export_log",
    "exported_entries",
    "import_log",
    "list_requests",
    "load_result",
    "mean_loss",
    "save_result",
    "verify_export",
]

promise(__name__, "deletion_log", "heads", "requests", "rivals", "search")
