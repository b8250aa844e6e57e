"""``examples/huggingface_encoders.py`` distils padded sequences, and padding changes nothing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_near

import fsp_kernels as fsp

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "examples" / "huggingface_encoders.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("huggingface_encoders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def characters(example):
    example.set_seed(0)
    return example.named_characters()[:200]


@pytest.fixture
def names(example, characters):
    example.set_seed(0)  # batches are drawn at random
    return example.Names(characters, example.tokenizer_of([name for name, _ in characters]))


@pytest.fixture
def networks(example, names):
    """A student and its teacher, without dropout."""
    return [example.encoder(layers, len(names.tokenizer)).eval() for layers in (2, 4)]


def loss_and_gradient(example, networks, batch):
    student = networks[0]
    student.zero_grad()
    loss = example.fsp_of(*networks, batch)
    loss.backward()
    weights = student.bert.encoder.parameters()
    return loss.detach(), torch.cat([x.grad.flatten() for x in weights])


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, 1e-5, "fp32; sums have another order with other padding")


def test_names_are_padded_to_the_longest(names):
    batch = names.batch(32)
    lengths = batch["attention_mask"].sum(1)
    assert lengths.min() < lengths.max() == batch["attention_mask"].shape[1]
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert (padding == names.tokenizer.pad_token_id).all()


def test_the_words_in_padded_positions_do_not_matter(example, names, networks):
    batch = names.batch(32)
    others = torch.randint_like(batch["input_ids"], 3, len(names.tokenizer))
    words = torch.where(batch["attention_mask"] == 1, batch["input_ids"], others)
    changed = batch | {"input_ids": words}
    assert not torch.equal(words, batch["input_ids"])
    expected = loss_and_gradient(example, networks, batch)
    assert_same(loss_and_gradient(example, networks, changed), expected)


def test_more_padding_does_not_matter(example, names, networks):
    batch = names.batch(32)
    wider = {key: F.pad(batch[key], (0, 9)) for key in ("input_ids", "attention_mask")}
    expected = loss_and_gradient(example, networks, batch)
    assert_same(loss_and_gradient(example, networks, wider), expected)


def test_the_loss_of_a_batch_is_the_mean_of_its_names_without_padding(example, names, networks):
    batch = names.batch(16)
    alone = []
    for words, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        only = {"input_ids": words[None, : mask.sum()], "attention_mask": mask[None, : mask.sum()]}
        alone.append(example.fsp_of(*networks, only))
    assert_same([example.fsp_of(*networks, batch)], [torch.stack(alone).mean()])


def test_without_the_mask_padding_would_matter(example, names, networks, monkeypatch):
    batch = names.batch(32)
    masked = example.fsp_of(*networks, batch)

    def without_masks(student, teacher, *, student_mask, teacher_mask, **options):
        assert student_mask is teacher_mask  # one tensor, which the loss recognises
        assert student_mask.dtype == torch.bool
        return fsp.fsp_loss(student, teacher, **options)

    monkeypatch.setattr(example, "fsp_loss", without_masks)
    assert (example.fsp_of(*networks, batch) / masked - 1).abs() > 0.1


def test_the_first_stage_changes_the_encoder_of_the_student_alone(example, names, networks):
    before = [{k: x.clone() for k, x in n.state_dict().items()} for n in networks]
    losses = example.distil(*networks, names, steps=2)
    assert len(losses) == 2
    changed = [
        {k for k, x in n.state_dict().items() if not torch.equal(x, old[k])}
        for n, old in zip(networks, before, strict=True)
    ]
    assert changed[1] == set()
    # The hidden states are before the pooler and the classifier, which are for the second stage.
    unchanged = before[0].keys() - changed[0]
    assert unchanged == {k for k in before[0] if k.startswith(("bert.pooler", "classifier"))}


@pytest.mark.slow
def test_the_script_distils_and_then_learns_the_task(example, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        example.main(steps=60)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    start, end = map(float, re.search(r"^FSP loss: (\S+) -> (\S+)$", printed, re.M).groups())
    assert 0 < end < 0.6 * start
    [found] = re.findall(r"^accuracy of the student: (\S+) -> (\S+)$", printed, re.M)
    before, after = map(float, found)
    assert before < 0.3  # of eight classes
    assert after > 0.4
