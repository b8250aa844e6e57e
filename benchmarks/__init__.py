"""The FSP loss beside the ways people write it today: speed, memory, accuracy, on a CPU or a GPU.

``python -m benchmarks`` runs the five parts, ``bench_<part>.py``, each a run of pytest-benchmark,
and draws their results:

* ``workloads.py``, ``networks.py``: what is measured; ``contenders.py``, ``peers.py``: of whom;
* ``race.py`` (CPU) and ``cuda.py`` take the times, ``floor.py`` and ``memory.py`` the rest;
* ``report/`` makes tables, figures and comparisons; ``results/README.md`` says how to read them.

Gates and tools for the kernels: ``kernels.py`` and ``extension.py`` (what each takes of a chip),
``kernel_model.py`` (what a workload's launches do and may take, found by ``launches.py`` and read
by ``machine_code.py``), ``sanitize.py`` over ``smoke.py`` (compute-sanitizer, whose hazards
``racecheck.py`` judges), ``tune.py`` (their configurations, by ``trials.py`` in processes of
``apart.py``), and ``first.py`` (what to run first on a GPU).
"""
