"""Lines about a long run whose progress bar is not shown."""

import sys

import pytest

from opacus_pi.cli.progress import ProgressLines


@pytest.mark.parametrize(
    ("seconds", "in_terminal", "printed"),
    [
        (1.0, False, ["15 of 40", "30 of 40"]),
        (0.1, False, []),
        (1.0, True, []),
    ],
)
def test_lines_come_now_and_then(seconds, in_terminal, printed, capsys, monkeypatch):
    now = [0.0]
    lines = ProgressLines(40, clock=lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: in_terminal, raising=False)
    for epoch in range(1, 41):
        now[0] += seconds
        lines.on_epoch_end(None, epoch, {})
    expected = [f"unlearning: {done} epochs" for done in printed]
    assert capsys.readouterr().err.splitlines() == expected
