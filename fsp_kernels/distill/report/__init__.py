"""Reports of finished runs: ``report.md``, ``report.html``, figures and tables.

``results.py`` reads runs and computes their statistics, ``figures.py`` draws them and
``writing.py`` writes the report from the templates.
"""

from fsp_kernels.distill.report.writing import write_report

__all__ = ["write_report"]
