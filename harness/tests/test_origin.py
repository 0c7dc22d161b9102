"""Weights that were read are not called random, nor random ones read."""

import subprocess
import sys
import threading

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from harness.reference import Models
from harness.reference.origin import Origin, watch_origins


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(12, 8, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 4)


def origin_of(build) -> Origin:
    with watch_origins() as seen:
        model = build()
    return seen.of(model)


def initialised(function, *args):
    def build():
        net = Net()
        for module in net.modules():
            if isinstance(module, nn.Linear):
                function(module.weight, *args)
        return net

    return build


RANDOM = {
    "layers of torch": Net,
    "truncated normal": initialised(nn.init.trunc_normal_),
    "orthogonal": initialised(nn.init.orthogonal_),
    "drawn aside and copied": initialised(lambda weight: weight.data.copy_(torch.randn(weight.shape) * 0.02)),
    "drawn as float64": initialised(lambda weight: weight.data.copy_(torch.randn(weight.shape, dtype=torch.float64))),
    "made on meta first": lambda: _emptied().apply(
        lambda value: value.reset_parameters() if hasattr(value, "reset_parameters") else None
    ),
    "cast": lambda: Net().half().float(),
    "scaled": initialised(lambda weight: weight.data.mul_(3).add_(1)),
}


def _emptied():
    with torch.device("meta"):
        net = Net()
    return net.to_empty(device="cpu")


@pytest.mark.parametrize("name", RANDOM)
def test_weights_that_were_drawn_are_random(name):
    assert origin_of(RANDOM[name]) is Origin.RANDOM


def stored(folder, how):
    """A function that builds `Net` and reads its weights from a file that is there already."""
    weights = dict(Net().state_dict().items())
    torch.save(weights, folder / "w.pt")
    safetensors.torch.save_file(weights, folder / "w.safetensors")
    numpy.savez(folder / "w.npz", **{name: weight.numpy() for name, weight in weights.items()})

    def read():
        if how == "numpy":
            return {name: torch.from_numpy(item) for name, item in numpy.load(folder / "w.npz").items()}
        if how == "safetensors":
            return safetensors.torch.load_file(folder / "w.safetensors")
        return torch.load(folder / "w.pt", weights_only=True, mmap=how == "mapped")

    def build():
        net = Net()
        if how == "assigned":
            net.load_state_dict(read(), assign=True)
        elif how == "in a thread":
            thread = threading.Thread(target=lambda: net.load_state_dict(read()))
            thread.start()
            thread.join()
        elif how == "in half":
            net.load_state_dict(
                {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in read().items()}
            )
        else:
            net.load_state_dict(read())
        return net

    return build


@pytest.mark.parametrize("how", ["copied", "assigned", "safetensors", "numpy", "mapped", "in a thread", "in half"])
def test_weights_that_were_read_are_loaded(tmp_path, how):
    assert origin_of(stored(tmp_path, how)) is Origin.LOADED


def test_a_model_that_was_there_before_is_loaded():
    before = Net()
    assert origin_of(lambda: before) is Origin.LOADED


def test_a_head_that_a_checkpoint_lacks_is_said(tmp_path):
    build = stored(tmp_path, "copied")

    def with_new_head():
        net = build()
        net.head.reset_parameters()
        return net

    def with_more_rows():
        net = build()
        rows = nn.Embedding(20, 8)
        rows.weight.data[:12].copy_(net.rows.weight.data)
        net.rows = rows
        return net

    def of_numpy():
        net = build()
        net.head.weight.data = torch.from_numpy(numpy.random.randn(4, 8).astype("float32"))
        return net

    assert [origin_of(item) for item in (with_new_head, with_more_rows, of_numpy)] == [Origin.PARTLY] * 3


def test_models_of_constants_and_without_weights():
    def constant():
        norm = nn.LayerNorm(8)
        nn.init.constant_(norm.weight, 2.0)
        return norm

    assert origin_of(constant) is Origin.COMPUTED
    assert origin_of(nn.ReLU) is Origin.NONE


def test_a_random_weight_that_a_constant_replaces_is_none():
    def zeros():
        head = nn.Linear(4, 4)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    assert origin_of(zeros) is Origin.COMPUTED


def test_memory_that_was_freed_says_nothing_of_what_comes_to_its_place(tmp_path):
    build = stored(tmp_path, "assigned")

    def after_noise():
        for _ in range(50):
            torch.randn(8, 8)
        return build()

    assert origin_of(after_noise) is Origin.LOADED


def test_models_knows_the_source_and_its_path(tmp_path):
    class Pretrained(Net):
        class config:
            _name_or_path = "checkpoints/mine"

    models = Models()
    for key, build, said in (
        ("a", stored(tmp_path, "safetensors"), "loaded:"),
        ("b", Net, ""),
        ("c", nn.ReLU, "none:"),
    ):
        models.base(key, build, seed=0)
        assert models.sources[key] == said
    models.base("d", lambda: _pretrained(tmp_path, Pretrained), seed=0)
    assert models.sources["d"] == "loaded:checkpoints/mine"


def _pretrained(folder, kind):
    net = kind()
    net.load_state_dict(torch.load(folder / "w.pt", weights_only=True))
    return net


def test_the_first_import_of_numpy_draws_nothing(tmp_path):
    """What model() imports for the first time must not look like numbers that it drew."""
    code = (
        "import torch; from harness.reference.origin import watch_origins\n"
        "weights = torch.ones(3)\n"
        "with watch_origins() as seen:\n"
        "    import numpy.random\n"
        "    model = torch.nn.Linear(3, 1, bias=False); model.weight.data = weights\n"
        "print(seen.of(model).name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["LOADED"], done.stderr[-500:]
