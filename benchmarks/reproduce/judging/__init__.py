"""Judges: from numbers to verdicts, by tests that can come out either way.

| file | what it decides |
|---|---|
| ``verdicts`` | what a verdict is, and how several become one |
| ``ranks`` | rank correlations over forget sets: permutation test and interval |
| ``order`` | do harder sets take longer to unlearn? |
| ``contrasts`` | differences between groups of sets, and means over sets |
| ``budgets`` | do budgets from the privacy loss leave less of the gap? |
| ``examples`` | rank correlations over many examples, by training |
| ``simulated`` | how often each judge errs |

``python -m benchmarks.reproduce.judging`` makes the table of the last one.

The unit of every test about forgetting is the forget set. Trainings (seeds) that
unlearn the same set share its examples and its oracles, so they are averaged first.
Every judge has been simulated without an effect and with one. It may find an effect
that does not exist in at most 5 % of the simulations.
"""
