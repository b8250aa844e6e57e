"""Weights: all of them or an error, but for a classifier of other classes; downloads are faked."""

from __future__ import annotations

import argparse
import textwrap
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fsp_kernels.distill.config import Network
from fsp_kernels.distill.models import CifarResNet, build_model, load_weights, read_weights
from fsp_kernels.errors import DistillError

State = dict[str, Tensor]


def build(name: str, in_channels: int = 3, classes: int = 10, **settings: Any) -> nn.Module:
    return build_model(Network(model=name, **settings), in_channels=in_channels, classes=classes)


def same(state: State, other: State, but: str = "-") -> bool:
    names = [name for name in state if not name.startswith(but)]
    return all(torch.equal(state[name], other[name]) for name in names)


def built_from(path: Path) -> State:
    return build("cifar/resnet8", weights=str(path)).state_dict()


@pytest.fixture
def state() -> State:
    return CifarResNet(8).state_dict()


def test_a_network_starts_from_a_file(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(state, tmp_path / "w.safetensors", {"format": "pt", "epoch": "3"})
    torch.save(state, tmp_path / "w.pt")
    # As PyTorch before 1.6 did.
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    for path in (*(tmp_path / f"w{end}" for end in (".safetensors", ".pt", ".pth")), "~/w.pt"):
        assert same(state, built_from(path))


def _in_checkpoint(state: State, key: str) -> dict[str, Any]:
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}}
    return {key: state, "epoch": 3, "optimizer": momentum}


def _by_lightning(state: State) -> dict[str, Any]:
    names = {f"model.{name}": x for name, x in state.items()}
    return {"state_dict": names | {"criterion.weight": torch.ones(2)}, "global_step": 7}


def _compiled_in_parts(state: State) -> State:
    return {name.replace("stage2.", "stage2._orig_mod."): x for name, x in state.items()}


def _averaged(state: State) -> State:
    averaged = torch.optim.swa_utils.AveragedModel(CifarResNet(8))
    averaged.module.load_state_dict(state)
    return averaged.state_dict()  # with the number of updates


KEYS = ("state_dict", "model", "net", "model_state_dict", "network", "weights", "ema")
PREFIXES = ("module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "net.ema.")


@pytest.mark.parametrize(
    "content",
    [
        *(partial(_in_checkpoint, key=key) for key in KEYS),
        *(lambda state, p=p: {f"{p}{name}": x for name, x in state.items()} for p in PREFIXES),
        _by_lightning,
        _compiled_in_parts,
        _averaged,
    ],
)
def test_weights_are_found_under_the_keys_and_prefixes_of_training_scripts(
    state: State, tmp_path: Path, content: Callable[[State], object]
) -> None:
    torch.save(content(state), tmp_path / "weights.pt")
    assert same(state, built_from(tmp_path / "weights.pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_networks_own_names_may_look_like_prefixes(tmp_path: Path, suffix: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.module = nn.Linear(2, 3), nn.Linear(2, 3)

    source, model = Inner(), Inner()
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    assert same(source.state_dict(), read_weights(path, model, "student.weights"))


def test_two_networks_in_one_file_are_named(state: State, tmp_path: Path) -> None:
    both = {f"{role}.{name}": x for role in ("student", "teacher") for name, x in state.items()}
    for content, places in (
        ({"state_dict": state, "state_dict_ema": state}, ("state_dict", "state_dict_ema")),
        ({"state_dict": both}, (r"state_dict\.student\.", r"state_dict\.teacher\.")),
    ):
        torch.save(content, tmp_path / "weights.pt")
        message = "several such networks, under '{}' and '{}'; keep one in a file".format(*places)
        with pytest.raises(DistillError, match=message):
            built_from(tmp_path / "weights.pt")


def test_a_classifier_of_other_classes_stays_as_it_was(state: State) -> None:
    model = CifarResNet(8, classes=4)
    fresh = model.fc.weight.clone()
    before = dict(state)
    load_weights(model, state, "teacher")
    assert torch.equal(model.fc.weight, fresh)
    assert same(state, model.state_dict(), but="fc.")
    assert all(state[name] is x for name, x in before.items())  # it is not changed


def test_a_convolution_can_be_the_classifier() -> None:
    def net(classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, classes, 1))

    source, model = net(10), net(2)
    load_weights(model, source.state_dict(), "teacher")
    assert torch.equal(model[0].weight, source[0].weight)
    assert model[1].weight.shape[0] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None}, r"^teacher\.weights: not of this network: lacks fc\.weight$"),
        (
            {"conv.weight": None, "bn.weight": None, "bn.bias": None, "fc.bias": None},
            r"lacks conv\.weight, bn\.weight, bn\.bias and 1 more$",
        ),
        ({"fc2.weight": torch.zeros(1)}, r"has unknown fc2\.weight$"),
        (
            {"fc.weight": None, "fc.bias": None, "head.bias": torch.zeros(1)},
            r"lacks fc\.weight, fc\.bias, has unknown head\.bias$",
        ),
        ({"conv.weight": torch.zeros(1, 2)}, r"has conv\.weight 1 x 2 for 16 x 3 x 3 x 3$"),
        ({"fc.weight": torch.zeros(10, 65)}, r"has fc\.weight 10 x 65 for 10 x 64$"),
    ],
)
def test_anything_else_that_does_not_fit_is_named(
    state: State, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {name: x for name, x in (state | change).items() if x is not None}
    with pytest.raises(DistillError, match=message):
        load_weights(CifarResNet(8), changed, "teacher.weights")


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda x: x.to("meta")])
def test_tensors_that_cannot_be_copied_are_named(
    state: State, change: Callable[[Tensor], Tensor]
) -> None:
    changed = state | {"fc.weight": change(state["fc.weight"])}
    message = r'^teacher\.weights: not of this network: .*"fc\.weight"'
    with pytest.raises(DistillError, match=message):
        load_weights(CifarResNet(8), changed, "teacher.weights")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_is_missing_or_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(DistillError, match=rf"^student\.weights: .*{name} cannot be read: No such"):
        built_from(path)
    for content in (b"not weights", b""):
        path.write_bytes(content)
        with pytest.raises(
            DistillError, match=r"^student\.weights: .* holds no plain state dict: "
        ):
            built_from(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no weights")
    with pytest.raises(DistillError, match="holds no plain state dict: "):
        built_from(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_refused_wherever_the_damage_is(
    state: State, tmp_path: Path, zipped: bool
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (1, 10, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DistillError, match=r"holds no plain state dict: \w"):
            built_from(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {1: torch.zeros(1)}])
def test_content_without_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(DistillError, match="holds no state dict, must hold tensors by name"):
        built_from(tmp_path / "weights.pt")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_program_of_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "weights.pt")
    with pytest.raises(
        DistillError, match=r"no plain state dict: [^.]*TorchScript archives.*load``$"
    ):
        built_from(tmp_path / "weights.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(CifarResNet(8), tmp_path / "weights.pt")
    message = r"no plain state dict: there is a \S+\.cifar\.CifarResNet in it, .* may run code"
    with pytest.raises(DistillError, match=message):
        built_from(tmp_path / "weights.pt")


def test_the_script_in_the_message_keeps_the_weights_of_a_file_with_objects(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, "checkpoint.pth")
    with pytest.raises(DistillError, match=r"there is a argparse\.Namespace in it") as caught:
        built_from(Path("checkpoint.pth"))
    exec(textwrap.dedent(str(caught.value).partition("as in\n")[2]))
    assert same(state, built_from(Path("weights.pt")))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cifar/resnet8", {"weights": "w.pt"}, r"weights: given beside pretrained"),
        ("cifar/resnet8", {}, "pretrained: is true, must be false: of cifar/resnet8 no weights"),
        ("torch.nn:Identity", {}, "pretrained: is true, must be false: of torch.nn:Identity no"),
    ],
)
def test_networks_without_published_weights_say_so(
    name: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(DistillError, match=rf"^student\.{message}"):
        build(name, pretrained=True, **settings)


def fake_download(monkeypatch: pytest.MonkeyPatch, state: State | Exception) -> None:
    """torchvision's downloads give ``state``."""
    from torchvision.models import WeightsEnum

    def get_state_dict(_self: object, *_args: object, **_keywords: object) -> State:
        if isinstance(state, Exception):
            raise state
        return state

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)


@pytest.mark.parametrize(("in_channels", "classes"), [(3, 1000), (3, 7), (1, 7)])
def test_torchvisions_weights_are_loaded_but_for_other_classes_and_channels(
    monkeypatch: pytest.MonkeyPatch, in_channels: int, classes: int
) -> None:
    models = pytest.importorskip("torchvision.models")
    published = models.resnet18().state_dict()
    fake_download(monkeypatch, published)
    model = build("torchvision/resnet18", in_channels, classes, pretrained=True)
    kept = {n: x for n, x in published.items() if not n.startswith(("fc.", "conv1."))}
    assert same(kept, model.state_dict())
    assert torch.equal(model.fc.weight, published["fc.weight"]) == (classes == 1000)
    summed = model.conv1.weight.sum(1)
    torch.testing.assert_close(summed, published["conv1.weight"].sum(1))


def test_weights_of_auxiliary_classifiers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    published = models.googlenet(init_weights=False).state_dict()
    assert "aux1.fc1.weight" in published
    fake_download(monkeypatch, published)
    model = build("torchvision/googlenet", pretrained=True)
    assert torch.equal(model.conv1.conv.weight, published["conv1.conv.weight"])
    assert model.transform_input  # what these weights were trained with


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash value")])
def test_a_failed_download_of_torchvision_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    pytest.importorskip("torchvision")
    fake_download(monkeypatch, error)
    with pytest.raises(
        DistillError,
        match=r"student\.pretrained: the weights of torchvision/resnet18 .*: .*(route|hash)",
    ):
        build("torchvision/resnet18", pretrained=True)


class Code:
    """Makes the file ``path`` when it is read from a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_the_published_weights_is_refused_and_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    models = pytest.importorskip("torchvision.models")
    url = models.get_model_weights("resnet18").DEFAULT.url
    kept = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]  # as of an earlier download
    kept.parent.mkdir(parents=True)
    torch.save(models.resnet18().state_dict() | {"code": Code(tmp_path / "ran")}, kept)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DistillError, match=r"student\.pretrained: .*resnet18"):
        build("torchvision/resnet18", pretrained=True)
    assert not (tmp_path / "ran").exists()


class NotCachedError(OSError, ValueError):
    """As huggingface_hub's own error is both."""


def test_timm_is_asked_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked: dict[str, Any] = {}

    def create_model(name: str, **keywords: Any) -> nn.Module:
        if keywords["pretrained"] and keywords["num_classes"] == 8:
            raise NotCachedError("no route")
        asked.update(keywords, name=name)
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", create_model)
    build("timm/resnet10t", 1, 7, pretrained=True)
    assert asked == {"name": "resnet10t", "pretrained": True, "in_chans": 1, "num_classes": 7}
    with pytest.raises(DistillError, match=r"student\.pretrained: the weights of .*: no route"):
        build("timm/resnet10t", 1, 8, pretrained=True)
