"""The FSP loss beside the ways people write it today: speed, memory, accuracy, on a CPU or a GPU.

``python -m benchmarks`` runs the five parts, ``bench_<part>.py``, each a run of pytest-benchmark,
and draws their results:

* ``workloads.py``, ``networks.py``: what is measured; ``contenders.py``, ``peers.py``: of whom;
* ``race.py`` (CPU) and ``cuda.py`` take the times, ``floor.py`` and ``memory.py`` the rest;
* ``report/`` makes tables, figures and comparisons; ``results/README.md`` says how to read them.
"""
