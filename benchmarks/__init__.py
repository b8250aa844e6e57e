"""The FSP loss beside the ways people write it today: speed, memory, accuracy, on a CPU or a GPU.

``python -m benchmarks`` measures five parts and draws a report; ``results.csv`` keeps the numbers.
``pytest benchmarks/`` times the same with pytest-benchmark.

* ``bench_<part>.py``, ``accuracy.py``: the parts; ``bench_host_time.py`` is for pytest alone;
* ``workloads.py``, ``networks.py``: what is measured; ``contenders.py``, ``peers.py``: whose code;
* ``measure.py``: the loop, contenders in turns; ``gpu_timing.py`` takes the times on a GPU;
* ``checks.py``: the step and its check; ``cases.py``, ``training_step.py`` prepare contenders;
* ``floor.py``, ``memory.py``, ``environment.py``: what stands beside the times;
* ``results.py``, ``report.py``, ``figures.py``, ``tables.py``: the CSV and what is drawn from it.
"""
