"""A small private training within budgets."""

from opacus_pi.accounting import RenyiFilter
from opacus_pi.integration.engine import PrivacyEngine
from tests.private_training import Log, Training


def filtered(budget, order=8.0, **options):
    engine = PrivacyEngine(
        accountant="rdp", recorder=Log(), renyi_filter=RenyiFilter(budget, order)
    )
    training = Training(engine=engine, **options)
    training.recorder = engine.recorder
    return training
