"""Parts that several benchmarks share; they import no benchmark.

``data`` and ``binary_data`` load data, ``models`` builds models (``resnet``,
``transformer``), ``training`` trains them. ``seeds`` repeats cases over seeds,
``report`` writes results, and ``facts`` describes what determines a result.
"""
