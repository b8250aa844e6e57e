"""What compute-sanitizer runs on a GPU (``python -m tools.smoke``), wherever kernels run."""

import pytest
from calls import DEVICE

from tools.smoke import CASES, TOLERANCES, error_of


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_smoke_case(case, backend):
    assert error_of(case, backend, DEVICE) <= TOLERANCES[case.dtype]
