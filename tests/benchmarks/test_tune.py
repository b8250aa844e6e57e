"""What benchmarks.tune makes of its timings; the timings themselves need a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import Configuration, Row

ROW = Row("sm_90", "one_pass", "half", "aligned", 64, Configuration(64, 64, 64, 4, 3), None)
OTHER = Configuration(64, 64, 32, 8, 2)


@pytest.mark.parametrize("row", configurations.rows()[:66])
def test_the_configuration_in_force_is_tried_first_and_none_twice(row):
    found = list(tune.candidates(row))
    assert found[0] == row.configuration
    assert len(set(found)) == len(found) > 1
    if row.kernel == "one_pass":  # whose channels are the shape's
        assert {c[:2] for c in found[1:]} == {(row.limit, row.limit)}


def test_a_faster_candidate_takes_the_row_and_says_where_it_was_measured():
    timings = [tune.Timing(ROW.configuration, 1.0), tune.Timing(OTHER, 0.8)]
    assert tune.tuned(ROW, timings, "a chip") == ROW._replace(
        configuration=OTHER, measured="a chip"
    )


def test_a_gain_within_the_noise_changes_only_what_was_measured():
    timings = [tune.Timing(ROW.configuration, 1.0), tune.Timing(OTHER, 0.99)]
    assert tune.tuned(ROW, timings, "a chip") == ROW._replace(measured="a chip")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_leaves_the_table(capsys):
    before = configurations.TABLE.read_text()
    assert tune.main([]) == 1
    assert "NVIDIA GPU" in capsys.readouterr().out
    assert configurations.TABLE.read_text() == before
