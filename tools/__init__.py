"""Tools for work on the kernels and for releases; users need none of them.

Run each as ``python -m tools.NAME``. These need no GPU:

* ``compile_triton``, ``compile_cuda``: compile every kernel for every chip, fail where one spills
  or does not fit, and write ``records/``, which the tests hold to the sources. ``calls.py`` makes
  the calls that reach each kernel; ``record.py`` reads and writes records.
* ``predict``: what the launches of a workload do, and the time that a model predicts.
  ``launches.py`` finds the launches, ``machine_code.py`` reads their code.

These are for releases. ``pythons.py`` finds interpreters:

* ``distribute``: build the source distribution and the wheels, install and run them.
* ``matrix``: run tests on each supported combination of versions.

These need a GPU:

* ``gpu_first``: what to run first on a new machine.
* ``sanitize``: compute-sanitizer over ``smoke``, every kernel on small maps. ``racecheck.py`` says
  which reported hazards are races.
* ``tune``: time the configurations of the Triton kernels. ``trials.py`` measures one,
  ``workers.py`` runs it in a process of its own.
"""
