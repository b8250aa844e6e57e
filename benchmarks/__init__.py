"""Speed, memory and accuracy of the FSP loss beside the ways people write it today.

``python -m benchmarks`` times every contender of ``contenders.py`` on every workload of
``workloads.py``, on a CPU or on an NVIDIA GPU; ``python -m benchmarks.accuracy`` measures gradients
near convergence. ``python -m benchmarks.sanitize`` runs the kernels under compute-sanitizer.
``results/README.md`` lists the published runs and the commands that made them.
"""
