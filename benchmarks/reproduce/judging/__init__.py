"""Judges: from numbers to verdicts, by tests that can come out either way.

| file | what it decides |
|---|---|
| ``verdicts`` | what a verdict is, and how several become one |
| ``runs`` | the runs that the judges of an order are given |
| ``ranks`` | rank correlations over sets and trainings: a test, and an interval |
| ``order`` | are harder sets farther from their oracles, and slower to unlearn? |
| ``contrasts`` | differences between groups of sets, and means over sets |
| ``budgets`` | do budgets from the privacy loss leave less of the gap? |
| ``examples`` | rank correlations over many examples, by training |
| ``scenario`` | a simulated study of known truth |
| ``simulated_runs`` | studies of unlearning runs, for ``order`` |
| ``simulated`` | the studies of every judge |

``python -m benchmarks.reproduce.judging`` simulates them and makes a table.

The unit of every test about forgetting is the forget set: trainings (seeds) that
unlearn the same set share its examples and its oracles.
Judges are simulated without an effect and with one. In the simulated cases, one may
find an effect that does not exist in at most 5 %. Cases that are known to fool a judge
are listed on the page of results.
"""
