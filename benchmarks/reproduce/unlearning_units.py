"""Units that unlearn: the search of a method's settings, and one run."""

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.reproduce.experiment import Experiment, Facts
from benchmarks.reproduce.forget import ForgetSet
from benchmarks.reproduce.judging import unlearn
from benchmarks.reproduce.lab import Lab
from benchmarks.reproduce.methods import METHODS
from benchmarks.reproduce.units import Training, Unit, needs_of_judging, oracles
from benchmarks.reproduce.work import Work
from opacus_pi.unlearning.search import search_settings


@dataclass(frozen=True)
class Search(Unit):
    """Settings of a method, found once on a random forget set (Appendix D)."""

    experiment: Experiment
    method: str

    @property
    def forget_set(self) -> ForgetSet:
        """Random, of the size of a stratum."""
        return ForgetSet("random", self.experiment.stratum_size)

    def needs(self) -> list[Unit]:
        """The model to unlearn and its oracles."""
        training = Training(self.experiment, 0)
        return [training, *oracles(self.experiment, self.forget_set)]

    def facts(self) -> Facts:
        """Experiment, method and ranges."""
        ranges = METHODS[self.method].ranges
        return self.experiment.facts() | {"method": self.method, "ranges": ranges}

    def work(self) -> Work:
        """A run for each trial."""
        if not METHODS[self.method].ranges:
            return Work()
        return work_of_run(self.experiment, self.forget_set) * (
            self.experiment.num_trials
        )

    def compute(self, lab: Lab) -> dict[str, Any]:
        """Search; nothing where nothing is to be found."""
        ranges = METHODS[self.method].ranges
        if not ranges:
            return {"settings": {}, "trials": []}
        measured = [one.run(lab) for one in oracles(self.experiment, self.forget_set)]
        found = search_settings(
            lambda settings: unlearn(
                lab, self.experiment, self.forget_set, self.method, settings, 0
            )[1],
            ranges,
            {name: [one[name] for one in measured] for name in measured[0]},
            num_trials=self.experiment.num_trials,
        )
        trials = [asdict(trial) for trial in found.trials]
        return {"settings": found.best.settings, "trials": trials}


def work_of_run(experiment: Experiment, forget_set: ForgetSet) -> Work:
    """One run, judged before the first and after every epoch."""
    epochs, kept = experiment.unlearn_epochs, experiment.sizes[0] - forget_set.size
    return Work(
        unlearned=epochs * kept,
        evaluated=(epochs + 1) * forget_set.judged(experiment),
    )


def needs_of_run(
    experiment: Experiment, forget_set: ForgetSet, method: str
) -> list[Unit]:
    """The trainings that rank, the oracles and the settings of a run of a method."""
    return [*needs_of_judging(experiment, forget_set), Search(experiment, method)]


def run_facts(
    experiment: Experiment, forget_set: ForgetSet, method: str, seed: int
) -> Facts:
    """What determines the run of a method."""
    own = {"forget": forget_set.facts(experiment), "seed": seed}
    return Search(experiment, method).facts() | own


@dataclass(frozen=True)
class Unlearning(Unit):
    """One unlearning run from one trained model, evaluated after every epoch."""

    experiment: Experiment
    forget_set: ForgetSet
    method: str
    seed: int

    def needs(self) -> list[Unit]:
        """Trainings, oracles, settings."""
        return needs_of_run(self.experiment, self.forget_set, self.method)

    def facts(self) -> Facts:
        """Experiment, forget set, method, seed."""
        return run_facts(self.experiment, self.forget_set, self.method, self.seed)

    def work(self) -> Work:
        """The run."""
        return work_of_run(self.experiment, self.forget_set)

    def compute(self, lab: Lab) -> dict[str, Any]:
        """Unlearn; evaluate."""
        experiment, forget_set = self.experiment, self.forget_set
        settings = Search(experiment, self.method).run(lab)["settings"]
        _, trace = unlearn(
            lab, experiment, forget_set, self.method, settings, self.seed
        )
        losses = lab.scores(experiment)["privacy loss"]
        return {
            "trace": trace.metrics,
            "times": trace.times,
            "cost": trace.cost,
            "settings": settings,
            "mean_loss": float(losses[forget_set.indices(lab, experiment)].mean()),
        }
