"""``Distiller``: the FSP loss of two networks in one call, and the networks left as they were."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fsp_kernels as fsp

SHARED = [("0", "1"), ("1", "2")]


def block(channels: int, wanted: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, wanted, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted), nn.ReLU())


def network(*widths: int) -> nn.Sequential:
    """Blocks ``0``, ``1``, ``2``, ..., then pooling and a classifier of 5 classes."""
    channels = (3, *widths)
    strides = (1, 2, 1, 1, 1)
    blocks = [block(c, n, s) for c, n, s in zip(channels, widths, strides)]  # noqa: B905
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


class Tokens(nn.Module):
    """A transformer's shapes: words (B, T) to a dict with states (B, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, channels)
        self.mix = nn.Linear(channels, channels)

    def forward(self, words: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"states": self.mix(scale * self.embed(words)).relu()}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def student() -> nn.Module:
    return network(4, 6, 6)


@pytest.fixture
def teacher() -> nn.Module:
    return network(4, 6, 6)


def recorded(model: nn.Module, pairs: Any, *args: Any) -> list[tuple[Tensor, Tensor]]:
    """The pairs of maps of one forward pass, by taps."""
    with fsp.FeatureTaps(model, [path for pair in pairs for path in pair]) as taps:
        model(*args)
        return taps.take_pairs()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "mse", "pool": "avg"}, {"norm": "column", "weights": [0.5, 2.0]}],
    ids=str,
)
def test_the_loss_is_that_of_the_recorded_maps(student, teacher, images, options):
    student.eval()  # batch normalisation must see the same statistics
    found = fsp.Distiller(student, teacher, SHARED, **options)(images)
    expected = fsp.fsp_loss(
        recorded(student, SHARED, images), recorded(teacher, SHARED, images), **options
    )
    torch.testing.assert_close(found.loss, expected)
    assert found.losses.shape == (2,)
    torch.testing.assert_close(found.losses.sum(), found.loss)


def test_outputs_are_those_of_the_networks(student, teacher, images):
    student.eval()
    found = fsp.Distiller(student, teacher, SHARED)(images)
    assert torch.equal(found.output, student(images))
    assert torch.equal(found.teacher_output, teacher(images))
    assert not found.teacher_output.requires_grad


def test_the_gradient_reaches_the_student_alone(student, teacher, images):
    fsp.Distiller(student, teacher, SHARED)(images).loss.backward()
    assert all(p.grad is not None for p in student[:3].parameters())
    assert all(p.grad is None for p in (*student[3:].parameters(), *teacher.parameters()))


def test_each_pairs_loss_has_a_gradient(student, teacher, images):
    first, _ = fsp.Distiller(student, teacher, SHARED)(images).losses
    first.backward()
    assert student[1][0].weight.grad is not None
    assert student[2][0].weight.grad is None or not student[2][0].weight.grad.any()


@pytest.mark.parametrize("back", ["distiller", "teacher"])
def test_the_teacher_stays_in_evaluation_mode(student, teacher, images, back):
    distiller = fsp.Distiller(student, teacher, SHARED)
    (distiller if back == "distiller" else teacher).train()
    before = copy.deepcopy(teacher.state_dict())
    distiller(images)
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert student.training


def test_the_constructor_changes_no_modes(student, teacher, images):
    fsp.Distiller(student, teacher, example=images)
    assert all(module.training for module in (*student.modules(), *teacher.modules()))


def test_the_teacher_is_no_part_of_the_module(student, teacher):
    distiller = fsp.Distiller(student, teacher, SHARED)
    assert [*distiller.parameters()] == [*student.parameters()]
    assert distiller.state_dict().keys() == {f"student.{name}" for name in student.state_dict()}


def test_the_teacher_moves_with_the_module(student, teacher, images):
    distiller = fsp.Distiller(student, teacher, SHARED).double()
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    assert distiller(images.double()).loss.dtype == torch.float64


# --- pairs --------------------------------------------------------------------------------------


def test_pairs_are_found(student, teacher, images):
    distiller = fsp.Distiller(student, teacher, example=images)
    assert [(pair.student, pair.teacher) for pair in distiller.pairs] == [(("1", "2"), ("1", "2"))]
    assert distiller(images).loss > 0


def test_pairs_of_a_known_architecture_are_found():
    models = pytest.importorskip("torchvision.models")
    images = torch.randn(1, 3, 64, 64)
    distiller = fsp.Distiller(models.resnet18(), models.resnet34(), "family", example=images)
    assert distiller.pairs[1].student == ("layer2.1:input", "layer2")
    assert distiller(images).losses.shape == (4,)


def test_paths_may_differ_between_the_networks(student, images):
    teacher = network(4, 6, 6, 6, 6)
    pairs = [(("0", "1"), ("0", "1")), (("1", "2"), ("1", "4"))]
    student.eval()
    found = fsp.Distiller(student, teacher, pairs)(images)
    ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
    expected = fsp.fsp_loss(recorded(student, ours, images), recorded(teacher, theirs, images))
    torch.testing.assert_close(found.loss, expected)


def test_channels_may_be_last_and_inputs_be_words():
    student, teacher = Tokens(6), Tokens(6)
    words = torch.randint(10, (3, 7))
    distiller = fsp.Distiller(
        student, teacher, [("embed", "mix")], example={"words": words}, channel_dim=-1
    )
    found = distiller(words, scale=2.0)
    assert found.output["states"].shape == (3, 7, 6)
    with fsp.FeatureTaps(student, ["embed", "mix"]) as ours:
        student(words, scale=2.0)
        a, b = ours.take()
    with fsp.FeatureTaps(teacher, ["embed", "mix"]) as theirs:
        teacher(words, scale=2.0)
        c, d = theirs.take()
    torch.testing.assert_close(found.loss, fsp.fsp_loss([(a, b)], [(c, d)], channel_dim=-1))


# --- projection ---------------------------------------------------------------------------------


def test_channels_are_projected_where_they_differ(images):
    student, teacher = network(4, 6, 3), network(4, 8, 5)
    distiller = fsp.Distiller(student, teacher, SHARED, example=images, projection=True)
    student.eval()
    found = distiller(images)
    (a, b), (c, d) = recorded(student, SHARED, images)
    kept, *project = distiller.projection.maps
    assert isinstance(kept, nn.Identity)
    ours = [(a, project[0](b)), (project[1](c), project[2](d))]
    expected = fsp.fsp_loss(ours, recorded(teacher, SHARED, images))
    torch.testing.assert_close(found.loss, expected)


def test_a_projection_has_the_students_dtype(images):
    student, teacher = network(4, 6, 3).double(), network(4, 8, 5).double()
    images = images.double()
    distiller = fsp.Distiller(student, teacher, SHARED, example=images, projection=True)
    assert distiller(images).loss.dtype == torch.float64


def test_a_projection_is_trained_with_the_student(images):
    student, teacher = network(4, 6, 3), network(4, 8, 5)
    distiller = fsp.Distiller(student, teacher, SHARED, example=images, projection=True)
    optimizer = torch.optim.SGD(distiller.parameters(), 1e-3)
    before = [p.detach().clone() for p in distiller.projection.parameters()]
    distiller(images).loss.backward()
    optimizer.step()
    after = [*distiller.projection.parameters()]
    assert len(after) == 3
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_channels_that_are_last_are_projected_too():
    student, teacher, words = Tokens(4), Tokens(6), torch.randint(10, (3, 7))
    distiller = fsp.Distiller(
        student, teacher, [("embed", "mix")], example=words, projection=True, channel_dim=-1
    )
    loss = distiller(words).loss
    loss.backward()
    assert all(p.grad.any() for p in distiller.projection.parameters())


# --- life ---------------------------------------------------------------------------------------


def test_the_networks_can_be_used_on_their_own(student, teacher, images):
    distiller = fsp.Distiller(student, teacher, SHARED)
    student.eval()
    first = distiller(images).loss
    student(2 * images), teacher(3 * images)
    assert torch.equal(distiller(images).loss, first)


def test_hooks_are_removed_and_come_back(student, teacher, images):
    distiller = fsp.Distiller(student, teacher, SHARED)
    student.eval()
    first = distiller(images).loss
    distiller.detach()
    assert hooks(student) == hooks(teacher) == 0
    assert torch.equal(distiller(images).loss, first)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_records_its_own_networks(student, teacher, images, copied):
    distiller = fsp.Distiller(student.eval(), teacher, SHARED)
    other = copied(distiller)
    with torch.no_grad():
        student[0][0].weight.zero_()
    assert not torch.equal(other(images).loss, distiller(images).loss)
    other(images).loss.backward()
    assert student[0][0].weight.grad is None


def test_it_can_be_compiled(student, teacher, images):
    torch._dynamo.reset()
    distiller = fsp.Distiller(student.eval(), teacher, SHARED)
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).losses, distiller(images).losses)


def test_it_works_under_autocast(student, teacher, images):
    distiller = fsp.Distiller(student, teacher, SHARED)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distiller(images).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert student[0][0].weight.grad.isfinite().all()


def test_it_works_under_ddp(student, teacher, images):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        distiller = fsp.Distiller(student, teacher, SHARED)
        parallel = DistributedDataParallel(distiller, find_unused_parameters=True)
        parallel(images).loss.backward()
    finally:
        dist.destroy_process_group()
    assert student[0][0].weight.grad.any()


# --- errors -------------------------------------------------------------------------------------

STUDENT, IMAGES = network(4, 6, 6), torch.randn(2, 3, 8, 8)
WRONG = {
    "a student that is no module": (
        {"student": network},
        TypeError,
        r"^student: got builtins.function, expected a torch.nn.Module$",
    ),
    "one network for both": (
        {"teacher": STUDENT},
        ValueError,
        r"^teacher: is the student itself, expected another network or a copy$",
    ),
    "an unknown way to find pairs": (
        {"pairs": "all"},
        ValueError,
        r"^pairs: got 'all', expected 'auto', 'family' or a list of pairs$",
    ),
    "no example": (
        {"pairs": "auto"},
        ValueError,
        r"^pairs: auto needs an example that begins with images",
    ),
    "words where images are needed": (
        {"pairs": "auto", "example": torch.ones(2, 3)},
        ValueError,
        r"^pairs: auto needs an example that begins with images \(B, C, H, W\); name the pairs$",
    ),
    "a projection without an example": (
        {"projection": True},
        ValueError,
        r"^example: got None, which projection=True needs$",
    ),
    "an example in a list": (
        {"example": [IMAGES]},
        TypeError,
        r"^example: got builtins.list, expected a tensor, a tuple of arguments or a dict",
    ),
    "an example that a network does not take": (
        {"example": IMAGES[:, :2]},
        ValueError,
        r"^student: cannot take images of 2 x 8 x 8: ",
    ),
    "no pairs": (
        {"pairs": []},
        ValueError,
        r"^pairs: got \[\], expected 'auto', 'family' or a list of pairs$",
    ),
    "a pair of three": (
        {"pairs": [("0", "1"), ("0", "1", "2")]},
        ValueError,
        r"^pairs\[1\]: got \('0', '1', '2'\), expected two module paths, or the student's two",
    ),
    "a path that is not there": (
        {"pairs": [("0", "layer1")]},
        ValueError,
        r"^layer1: Sequential has no module 'layer1'",
    ),
    "a path that is not in the teacher": (
        {"pairs": [("0", "6")], "student": nn.Sequential(*network(4, 6, 6), nn.ReLU())},
        ValueError,
        r"^6: Sequential has no module '6'",
    ),
    "channels that differ": (
        {"teacher": network(5, 6, 6), "example": IMAGES},
        ValueError,
        r"^pairs\.0: the student's FSP matrix is 4 x 6, the teacher's 5 x 6; .* projection must be",
    ),
    "an unknown norm": ({"norm": "l2"}, ValueError, r"^norm: got 'l2'"),
    "too many weights": (
        {"weights": [1.0] * 3},
        ValueError,
        r"^weights: got 3 for 2 pairs, expected one for each pair$",
    ),
    "an axis that is none": ({"channel_dim": 2}, ValueError, r"^channel_dim: got 2"),
}


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_and_changes_nothing(change, kind, message):
    networks = {"student": STUDENT, "teacher": network(4, 6, 6), **change}
    modules = [
        module
        for name in ("student", "teacher")
        if isinstance(networks[name], nn.Module)
        for module in networks[name].modules()
    ]
    with pytest.raises(kind, match=message):
        fsp.Distiller(**{"pairs": SHARED, **networks})
    assert all(module.training for module in modules)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_a_map_that_is_overwritten_is_named(teacher, images):
    student = network(4, 6, 6)
    student[1].append(nn.ReLU(inplace=True))
    distiller = fsp.Distiller(student, teacher, [("0", "1.2")])
    with pytest.raises(ValueError, match=r"^1\.2: was overwritten in place"):
        distiller(images)


# --- masks ----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A network of sequences ``(B, T)`` that has a mask among its keywords, as Hugging Face's."""

    def __init__(self):
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, words: Tensor, attention_mask: Any = None) -> Tensor:  # noqa: ARG002
        return self.second(self.first(self.words(words)))


def encoders(**options: Any) -> tuple[fsp.Distiller, Tensor, Tensor]:
    """Two of them, words, and a mask of integers."""
    distiller = fsp.Distiller(
        Encoder(), Encoder(), [("first", "second")], channel_dim=-1, **options
    )
    mask = (torch.arange(7) < torch.tensor([7, 4, 1])[:, None]).long()
    return distiller, torch.randint(9, (3, 7)), mask


@pytest.mark.parametrize("convert", [Tensor.long, Tensor.bool, Tensor.float], ids=str)
def test_a_mask_comes_among_the_keywords(convert):
    distiller, words, mask = encoders(mask="attention_mask")
    found = distiller(words, attention_mask=convert(mask))
    ours, theirs = (
        recorded(network, [("first", "second")], words)
        for network in (distiller.student, distiller.teacher)
    )
    masks = {"student_mask": mask.bool(), "teacher_mask": mask.bool()}
    torch.testing.assert_close(found.loss, fsp.fsp_loss(ours, theirs, channel_dim=-1, **masks))
    other = torch.where(mask.bool(), words, 0)
    assert torch.equal(distiller(other, attention_mask=mask).loss, found.loss)


def test_without_a_name_no_keyword_is_a_mask():
    distiller, words, mask = encoders()
    assert torch.equal(distiller(words, attention_mask=mask).loss, distiller(words).loss)


@pytest.mark.parametrize("name", [1, True, "", "attention mask", torch.ones(2).bool()], ids=repr)
def test_the_name_of_a_mask_must_be_one_of_a_keyword(name):
    with pytest.raises(TypeError, match=r"mask: got .*, expected the name of a keyword"):
        encoders(mask=name)


def test_a_mask_that_does_not_come_is_an_error():
    distiller, words, mask = encoders(mask="attention_mask")
    with pytest.raises(TypeError, match="attention_mask: is missing, expected a tensor"):
        distiller(words)
    with pytest.raises(TypeError, match="attention_mask: got None, expected a tensor"):
        distiller(words, attention_mask=None)
    with pytest.raises(ValueError, match=r"student_mask: has shape \(3, 5\)"):
        distiller(words, attention_mask=mask[:, 2:])
