"""Small trainings whose states are saved, for tests of rewinds."""

import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_pi import PrivacyEngine, Recorder, Unlearner
from opacus_pi.recording import Checkpoints
from tests.private_training import ADAPTIVE

SIZE, CLASSES, EPOCHS = 40, 3, 3
CRITERION = nn.CrossEntropyLoss()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE, 5, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (SIZE,), generator=generator))


def net(norm=False, dropout=False):
    middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
    last = nn.Dropout(0.5) if dropout else nn.Identity()
    return nn.Sequential(nn.Linear(5, 8), middle, last, nn.Linear(8, CLASSES))


class Saved:
    """A training by ``make_private``, or by ``make_monitored`` if it is not private.

    Args:
        folder: Of the states; None: none are saved.
        policy: The deletion policy.
        every: Updates from state to state.
        private: Whether it clips and adds noise.
        poisson: Whether it draws by Poisson sampling.
        norm: Whether the model has BatchNorm.
        noise: Noise multiplier, or the noise on the mean gradient.
        dropout: Whether the model has dropout.
        make_optimizer: ``params -> Optimizer``.
        seed: Of everything random.
        train: Whether to train at once.
        recorder: The class of the recorder.
        clipping: How it clips.
        options: Of ``Checkpoints``.
    """

    def __init__(
        self,
        folder=None,
        policy=None,
        *,
        every=1,
        private=True,
        poisson=True,
        norm=False,
        noise=1.0,
        dropout=False,
        make_optimizer=None,
        seed=0,
        train=True,
        recorder=Recorder,
        clipping="flat",
        **options,
    ):
        torch.manual_seed(seed)
        self.data, self.net = data(), net(norm, dropout)
        kept = {}
        if folder is not None:
            options["deletion_policy"] = policy
            kept = {"checkpoints": Checkpoints(folder, every, **options)}
        mode = {} if private else {"mode": "swept", "criterion": CRITERION}
        self.engine = PrivacyEngine(accountant="rdp", recorder=recorder(**mode, **kept))
        make_optimizer = make_optimizer or (
            lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)
        )
        self.plain = make_optimizer(self.net.parameters())
        common = {
            "module": self.net,
            "optimizer": self.plain,
            "data_loader": DataLoader(self.data, batch_size=8, shuffle=True),
            "poisson_sampling": poisson,
        }
        if private:
            adaptive = ADAPTIVE if clipping == "adaptive" else {}
            common |= {"noise_multiplier": noise, "max_grad_norm": 1.0}
            prepare = self.engine.make_private
            common |= {"clipping": clipping, **adaptive}
        else:
            prepare = self.engine.make_monitored
            common |= {"noise_std": noise, "criterion": CRITERION}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = prepare(**common)
        self.model, self.optimizer, self.loader = prepared
        if train:
            self.train()

    def train(self, epochs=EPOCHS):
        scheduler = torch.optim.lr_scheduler.StepLR(self.plain, 1, gamma=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(epochs):
                for x, y in self.loader:
                    self.optimizer.zero_grad()
                    CRITERION(self.model(x), y).backward()
                    self.optimizer.step()
                scheduler.step()

    @property
    def states(self):
        return self.engine.recorder.checkpoints

    def unlearner(self, **options):
        return Unlearner(self.engine, criterion=CRITERION, **options)

    def late(self, at_least=2):
        """An example that was first drawn in this update or later."""
        first = self.states.record.first_updates()
        last = self.states.record.num_steps
        found = [i for i in first.argsort() if at_least <= first[i] <= last]
        return int(found[0]), int(first[found[0]])


def weights(model):
    return torch.cat([v.flatten().double() for v in model.state_dict().values()])
