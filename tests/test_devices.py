"""What all backends with fused kernels share: how fp32 is multiplied, and on which device."""

from __future__ import annotations

import pytest
import torch

from fsp_kernels.backends.devices import fp32_precision, raw_stream, why_no_gpu


@pytest.mark.parametrize(
    ("precision", "wanted"), [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")]
)
def test_fp32_products_follow_the_precision_that_was_set(precision, wanted):
    torch.set_float32_matmul_precision(precision)
    assert fp32_precision() == wanted


def test_fp32_products_follow_the_older_switch():
    torch.backends.cuda.matmul.allow_tf32 = True
    assert fp32_precision() == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert fp32_precision() == "tf32x3"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch 2.9 has it first"
)
def test_fp32_products_follow_the_newer_setting():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert fp32_precision() == "tf32"


def test_fp32_products_are_accurate_unless_told_otherwise():
    assert fp32_precision() == "tf32x3"


def test_the_stream_of_a_cpu_is_none():
    assert raw_stream(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("reasons", "asked", "expected"),
    [
        ([None, "no"], [0], None),
        (["too old", None, "no"], [0, 1], None),
        (["too old", "no"], [0, 1], "too old"),
    ],
    ids=["the first works", "another works", "none works"],
)
def test_gpus_are_asked_about_until_one_works(monkeypatch, reasons, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(reasons))
    seen = []
    assert why_no_gpu(lambda i: seen.append(i) or reasons[i]) == expected
    assert seen == asked
