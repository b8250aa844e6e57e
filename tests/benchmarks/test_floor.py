"""The least bytes and flops of a step, and how fast a device is at them."""

import fake_gpu
import pytest
import torch

from benchmarks import floor
from benchmarks.workloads import FORWARD, Case, Workload, feature_maps

EQUAL = Workload("equal", 8, (((6, 4), (6, 4)),))
WIDE = Workload("wide", 8, (((512, 7), (512, 7)),))


@pytest.fixture(autouse=True)
def _measured_anew(monkeypatch):
    monkeypatch.setattr(floor, "_fastest", {})


@pytest.fixture
def rates(monkeypatch):
    """Set the seconds of each repetition of what is timed."""

    def take(*seconds):
        monkeypatch.setattr(floor, "_seconds_of_each", lambda *_: list(seconds))

    return take


def test_the_floor_is_four_reads_and_two_writes_of_equal_maps():
    one = 8 * 6 * 16 * 2  # bytes in bf16
    maps = feature_maps(EQUAL, 8, torch.bfloat16)
    assert floor.floor_bytes(*maps) == 6 * one
    assert floor.floor_bytes(*maps, training=False) == 4 * one


def test_pooled_maps_are_read_and_their_gradients_written_at_full_size():
    pooled = Workload("pooled", 2, (((6, 8), (5, 4)),))
    assert floor.floor_bytes(*feature_maps(pooled, 2)) == 3 * 4 * 2 * (6 * 64 + 5 * 16)


def test_the_matrix_form_takes_four_products_and_half_of_them_without_gradients():
    product = 2 * 8 * 6 * 6 * 16
    maps = feature_maps(EQUAL, 8)
    assert floor.floor_flops(*maps) == 4 * product
    assert floor.floor_flops(*maps, training=False) == 2 * product


def test_a_map_with_itself_is_read_and_multiplied_once():
    maps = feature_maps(Workload("symmetric", 8, EQUAL.layers, symmetric=True), 8)
    assert floor.floor_bytes(*maps) == 3 * 8 * 6 * 16 * 4
    assert floor.floor_flops(*maps) == 2 * 2 * 8 * 6 * 6 * 16


def test_positions_that_do_not_count_are_not_read_but_their_gradients_are_written():
    padded = Workload("padded", 8, (((6, 16), (6, 16)),), tokens=True, padded=True)
    maps, mask = feature_maps(padded, 3), padded.mask(3)
    assert mask.sum(1).tolist() == [2, 9, 16]
    assert floor.floor_bytes(*maps, mask=mask) == 4 * 6 * 27 * 4 + 2 * 6 * 48 * 4
    form = {2: 6 * 12 * 4 + 8 * 6 * 4, 9: 4 * 2 * 36 * 9, 16: 4 * 2 * 36 * 16}
    assert floor.floor_flops(*maps, mask=mask) == sum(form.values())


def test_few_positions_take_fewer_flops_than_products_of_maps():
    assert floor.floor_flops(*feature_maps(WIDE, 2)) < 4 * 2 * 2 * 512 * 512 * 49 / 4


def test_the_fastest_repetition_of_the_run_counts(rates):
    row = {"dtype": "fp32", "floor_bytes": 1000}
    for seconds in (2e-3, 1e-3, 4e-3):
        rates(7e-3, seconds, 5e-3)
        floor.copy_rate("cpu", 1000)
        floor.matrix_rate("cpu", "fp32")
    assert floor.with_final_rates(row, "cpu") == row | {
        "copy_bytes_per_second": pytest.approx(1000 / 1e-3),
        "matrix_flops_per_second": pytest.approx(2 * floor.MATRIX_SIZE["cpu"] ** 3 / 1e-3),
    }


def test_a_gpu_is_measured_once(rates, monkeypatch):
    fake_gpu.install(monkeypatch)
    for seconds in (2e-3, 1e-3):
        rates(seconds)
        found = floor.copy_rate("cuda", 1000), floor.matrix_rate("cuda", "bf16")
    row = floor.with_final_rates({"dtype": "bf16", "floor_bytes": 1000}, "cuda")
    size = floor.MATRIX_SIZE["cuda"]
    assert found == (fake_gpu.PROPERTIES.total_memory / 4 / 2e-3, 2 * size**3 / 2e-3)
    assert (row["copy_bytes_per_second"], row["matrix_flops_per_second"]) == found


def test_a_row_without_a_floor_stays_as_it_is():
    assert floor.with_final_rates({"dtype": "fp32"}, "cpu") == {"dtype": "fp32"}


def test_what_a_cpu_widens_counts_as_fp32(monkeypatch):
    speed = {torch.bfloat16: 1.0, torch.float32: 5.0}
    monkeypatch.setattr(floor, "_product_rate", lambda _, dtype: speed[dtype])
    assert floor.matrix_rate("cpu", "bf16") == 5.0


def test_three_products_of_tf32_may_stand_for_one_of_fp32(monkeypatch):
    speed = {"highest": 1.0, "high": 9.0}
    monkeypatch.setattr(
        floor, "_product_rate", lambda *_: speed[torch.get_float32_matmul_precision()]
    )
    assert floor.matrix_rate("cuda", "fp32") == 3.0
    assert torch.get_float32_matmul_precision() == "highest"


def test_this_machine_copies_and_multiplies():
    facts = floor.floor_facts(Case(EQUAL, 8, direction=FORWARD), *feature_maps(EQUAL, 8), "cpu")
    assert facts["floor_bytes"] == 4 * 4 * 8 * 6 * 16
    assert 1e6 < facts["copy_bytes_per_second"] < 1e13
    assert 1e8 < facts["matrix_flops_per_second"] < 1e14
