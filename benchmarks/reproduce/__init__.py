"""Reproduce the paper's figures, each by one command, with a verdict on its claim.

The flow, one file or folder each:

1. ``experiment``: the data, the training recipe and the sizes of a study. ``scales``
   names five of them, from minutes on a laptop to the paper's sizes.
2. ``units``, ``poison_units``, ``barrier_units``, ``bound_units``: independent jobs,
   for example one training or one unlearning run. ``pool`` runs them in parallel.
3. ``store``: every result, stored under a hash of everything that determines it.
   ``workspace`` adds the images, the trained models, their ledgers and scores.
4. ``outcomes``: arrays from stored results, a row per seed, a column per forget set.
5. ``figures``: which units a figure needs, its numbers, its picture.
6. ``judging``: whether the numbers confirm the claim, and how often that errs.
7. ``publication``: writes a figure's numbers, verdict, picture and table.
8. ``page``: ``docs/results.md`` from stored numbers, without training anything, in
   ``sections`` that are made of verdicts; ``earlier`` describes results that cannot be
   judged. ``judges_page``: ``docs/judges.md``, how claims are judged.
9. ``progress`` and ``journal``: what is left to do, and moving to another machine.

Start reading at ``__main__``; ``python -m benchmarks.reproduce -h`` shows the options.
"""
