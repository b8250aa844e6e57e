"""A network's logits chosen from all it gives: everything that runs the network sees them alone."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models.registry import SelectLogits


@dataclass
class Output:
    logits: Tensor
    states: tuple[Tensor, ...]


class Net(nn.Module):
    """Gives its logits in a ``kind`` of output."""

    def __init__(self, kind: str = "object") -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> object:
        y = self.fc(x)
        outputs = {
            "object": Output(y, (x,)),
            "tuple": (y, x),
            "mapping": {"logits": y},
            "tensor": y,
        }
        return outputs[self.kind]


X = torch.randn(5, 4)


def selecting(path: str, kind: str = "object") -> Net:
    model = Net(kind)
    model.register_forward_hook(SelectLogits(path, "student.logits"))
    return model


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("object", ":output.logits"),
        ("tuple", ":output[0]"),
        ("mapping", ":output.logits"),
        ("tensor", ":output[0]"),  # what some networks give in one of their modes
    ],
)
def test_the_logits_take_the_place_of_all_that_the_network_gives(kind: str, path: str) -> None:
    model = selecting(path, kind)
    assert torch.equal(model(X), model.fc(X))


def test_names_of_weights_and_modules_stay() -> None:
    model = selecting(":output.logits")
    assert list(model.state_dict()) == ["fc.weight", "fc.bias"]
    assert [name for name, _ in model.named_modules()] == ["", "fc"]


def test_copies_and_files_of_the_network_give_logits_too() -> None:
    model, file = selecting(":output.logits"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(X), model(X))


def test_a_compiled_network_gives_logits() -> None:
    torch._dynamo.reset()
    model = selecting(":output.logits")
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))


def test_an_exported_network_gives_logits_of_any_batch() -> None:
    model = selecting(":output.logits")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (X,), dynamic_shapes=shapes).module()
    assert torch.equal(program(X[:2]), model(X[:2]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (":out", r"^student\.logits: :out: ends in 'out', must end in ':input' or ':output'"),
        ("fc:output", r"^student\.logits: is 'fc:output', must choose in the network's own output"),
        (":input[0]", r"^student\.logits: is ':input\[0\]', must choose in the network's own out"),
        ("logits", r"^student\.logits: is 'logits', must choose in the network's own output"),
    ],
)
def test_another_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        selecting(path)


def test_logits_that_are_not_there_are_named() -> None:
    message = r"^student\.logits: :output\[2\]: has no 2, as :output is a tuple of 2; choose"
    with pytest.raises(DistillError, match=message):
        selecting(":output[2]", "tuple")(X)
