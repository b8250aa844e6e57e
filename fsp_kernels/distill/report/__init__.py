"""What finished runs say together: tables, figures, ``report.md`` and ``report.html``.

``comparison.py`` reads and groups runs, ``metrics.py`` makes numbers of them, ``figures.py``
pictures, ``text.py`` words; ``writing.py`` puts the files into a folder.
"""

from fsp_kernels.distill.report.text import headline
from fsp_kernels.distill.report.writing import Report, write_report

__all__ = ["Report", "headline", "write_report"]
