"""How well a model has forgotten, judged beside a model that never knew.

Each metric is a pure function of arrays or models; none knows an unlearning method.
"""
