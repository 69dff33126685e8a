"""Attribution: which example of the data set each sample of a physical batch is.

Between the data set and the optimizer, ``collate_fn`` and the user's loop may do
anything. A sample is attributed by the strongest of three kinds of evidence, and stays
unattributed if there is none:

1. *storage*: the model was given samples of the very tensors that the loader delivered,
   with the content that they had;
2. *content*: it was given copies, recognised by a checksum of each sample;
3. *latest*: it was given tensors that the loop computed, presumably from the one batch
   that is still unused. This is assumed, not verified: samples are assumed to be in the
   order of delivery.

A loader is observed (``observer``), its items are matched through ``collate_fn``
(``item_fingerprints``, ``collate_identity``), its deliveries and the model's forward
passes are described (``delivery``), compared (``samples``, ``model_inputs``,
``lookalikes``, ``evidence``, ``mixtures``) and joined (``tracker``, ``gradients``);
every uncertainty has a cause (``causes``). A run can be resumed within an epoch
(``epoch_position``). The targets of a known criterion are compared, too (``targets``).
Nothing here depends on Opacus: ``opacus_pi.integration`` connects an engine's loaders,
models and optimizers.
"""

from opacus_pi._promised import promise
from opacus_pi.attribution.collate_identity import keeps_order
from opacus_pi.attribution.delivery import LEFT_OUT, UNATTRIBUTED
from opacus_pi.attribution.epoch_position import EpochPosition
from opacus_pi.attribution.forward_probe import ForwardProbe, probe
from opacus_pi.attribution.observer import (
    LoaderObserver,
    observe,
    observe_like,
    observer_of,
    tracker_of,
)
from opacus_pi.attribution.targets import TargetOrder
from opacus_pi.attribution.tracker import Tracker

__all__ = [
    "LEFT_OUT",
    "UNATTRIBUTED",
    "EpochPosition",
    "ForwardProbe",
    "LoaderObserver",
    "TargetOrder",
    "Tracker",
    "keeps_order",
    "observe",
    "observe_like",
    "observer_of",
    "probe",
    "tracker_of",
]

promise(__name__)
