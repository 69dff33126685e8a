"""The paper's figures, each by one command: see ``python -m benchmarks.reproduce -h``.

``experiment`` says what is trained; ``units`` are the independent jobs (a training, an
oracle, an unlearning run), each computed once and kept under a key made of everything
that determines it; ``figures`` ask for units and turn their results into tables,
pictures and verdicts.
"""
