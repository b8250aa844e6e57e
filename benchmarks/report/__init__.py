"""The reading side: ``<part>.json`` files to tables, figures and comparisons.

``runs.py`` reads them, one module for each part makes its tables, ``figures/`` draws,
``compare.py`` holds runs against each other. Nothing here measures.
"""

from benchmarks.report.figures import require_matplotlib
from benchmarks.report.main import draw, main, plain
from benchmarks.report.runs import Run, Unreadable, load

__all__ = ["Run", "Unreadable", "draw", "load", "main", "plain", "require_matplotlib"]
