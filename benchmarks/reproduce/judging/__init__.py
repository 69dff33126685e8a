"""Judges: from numbers to verdicts, by tests that can come out either way.

| file | what it decides |
|---|---|
| ``effects`` | a measured effect: size, interval, p-value, and their text |
| ``verdicts`` | what a verdict is, and how several become one |
| ``runs`` | the runs that the judges of an order are given |
| ``ranks`` | rank correlations over sets and trainings: a test, and an interval |
| ``order`` | are harder sets farther from their oracles, and slower to unlearn? |
| ``contrasts`` | differences between groups of sets, and between two values of each |
| ``equivalence`` | are values the same on all sets, within a fixed margin? |
| ``budgets`` | how much less do budgets from the loss leave? Described, not judged |
| ``choices`` | which training and which oracle choose the sets? All, in turn |
| ``speeds`` | is the hardest quarter slower; do speeds separate less for large sets? |
| ``examples`` | rank correlations over many examples, within classes |
| ``jackknife`` | replicates of a statistic of many models |
| ``scenario`` | a simulated study of known truth |
| ``simulated_runs`` | studies of unlearning runs, for ``order`` |
| ``simulated_speeds`` | studies of runs of given speeds, for ``speeds`` |
| ``simulated_values`` | studies of values of sets and examples, for the other judges |
| ``simulated`` | the studies of every judge |

``python -m benchmarks.reproduce.judging`` simulates them and makes a table.

The unit of every test about forgetting is the forget set: trainings (seeds) that
unlearn the same set share its examples and its oracles. Correlations over examples have
the class as the unit.
Judges are simulated without an effect and with one. In the simulated cases, one may
find an effect that does not exist in at most 5 %. Cases that are known to fool a judge
are listed in docs/judges.md.
"""
