"""The reference: one build, true copies, float16 products as torch rounds them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from harness.errors import CaseError, RunError
from harness.reference import (
    Models,
    copy_module,
    digest,
    fresh,
    inputs_digest,
    move,
    moved_by_one_rounding,
    roundoff,
    run,
    run_cpu,
    tensors_of,
)
from harness.torch_private import aten_operator

CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("steps", torch.tensor(3))


def test_a_copy_has_its_own_tensors_and_keeps_ties():
    model = Tied()
    copied = copy_module(model, dtype=torch.float16, device=CPU)
    assert copied.head.weight is copied.embedding.weight
    assert (copied.head.weight.dtype, copied.scale.dtype, copied.steps.dtype) == (
        torch.float16,
        torch.float16,
        torch.int64,
    )
    with torch.no_grad():
        copied.scale.zero_()
    assert model.scale.sum() == 8


def test_weights_are_built_once_and_dtypes_are_copies():
    models, builds = Models(), []

    def build():
        builds.append(1)
        return nn.Linear(4, 4)

    first = models.get("key", build, seed=3, dtype=torch.float32, device=CPU)
    half = models.get("key", build, seed=3, dtype=torch.bfloat16, device=CPU)
    assert models.get("key", build, seed=3, dtype=torch.float32, device=CPU) is first
    assert models.get("key", build, seed=3, dtype=torch.bfloat16, device=CPU) is half
    assert torch.equal(half.weight, first.weight.bfloat16())
    assert len(builds) == 1


def test_the_seed_of_the_weights_is_what_makes_them_and_nothing_else_is_touched():
    before = torch.get_rng_state()
    weights = [
        Models().get("key", lambda: nn.Linear(4, 4), seed=seed, dtype=torch.float32, device=CPU).weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_last_model_is_kept():
    models = Models()
    first = models.get("a", lambda: nn.Linear(2, 2), seed=0, dtype=torch.float32, device=CPU)
    models.get("b", lambda: nn.Linear(2, 2), seed=0, dtype=torch.float32, device=CPU)
    assert models.get("a", lambda: nn.Linear(2, 2), seed=0, dtype=torch.float32, device=CPU) is not first


def test_what_is_no_module_is_refused():
    with pytest.raises(CaseError, match="returned None where a torch.nn.Module was expected"):
        Models().get("key", lambda: None, seed=0, dtype=torch.float32, device=CPU)


class Products(nn.Module):
    """Every kind of product that AIMv2 and its relatives have."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 32, 4, stride=4), nn.Linear(32, 32)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        tokens = self.linear(tokens)
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens) @ tokens.transpose(1, 2)


def test_float16_products_are_those_of_torch_to_a_last_place(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    model = Models().get("key", Products, seed=0, dtype=torch.float16, device=CPU)
    x = torch.randn(2, 3, 32, 32, generator=generator).half()
    monkeypatch.setattr("harness.reference.runs._has_float16_products", lambda: True)
    native, _, words = run_cpu(model, x, forward=None, dtype=torch.float16)
    assert words == "CPU float16"
    monkeypatch.setattr("harness.reference.runs._has_float16_products", lambda: False)
    wide, _, words = run_cpu(model, x, forward=None, dtype=torch.float16)
    assert "summed in float32" in words
    assert wide.dtype == torch.float16
    exact = copy_module(model, dtype=torch.float64, device=CPU)(x.double())
    error = [(tensor.double() - exact).norm() / exact.norm() for tensor in (native, wide)]
    assert error[1] <= 1.1 * error[0] < 2**-9


def test_an_exception_names_the_side_and_keeps_its_cause():
    with pytest.raises(RunError, match="on the moon: RuntimeError: (addmm: )?mat1 and mat2") as caught:
        run(nn.Linear(2, 2), torch.ones(1, 3), forward=None, where="on the moon")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_inputs_go_in_as_argument_arguments_or_keywords():
    model = nn.Bilinear(2, 3, 4)
    left, right = torch.ones(1, 2), torch.ones(1, 3)
    expected = model(left, right)
    for inputs in ((left, right), {"input1": left, "input2": right}):
        assert torch.equal(run(model, inputs, forward=None, where="here"), expected)
    assert torch.equal(run(model, left, forward=lambda model, x: model(x, right), where="here"), expected)


def test_outputs_are_named_by_keys_and_positions():
    tensor = torch.ones(2)
    assert list(tensors_of(tensor, "x")) == ["output"]
    assert list(tensors_of({"logits": tensor, "states": (tensor, None, [tensor])}, "x")) == [
        "logits",
        "states.0",
        "states.2.0",
    ]
    for nothing in (None, (), {}, [None]):
        with pytest.raises(CaseError, match="nothing to compare"):
            tensors_of(nothing, "x")
    with pytest.raises(CaseError, match="nothing to compare"):
        tensors_of({"loss": 1.0}, "x")
    with pytest.raises(CaseError, match="a set at 'kept'"):
        tensors_of({"kept": {1}, "logits": tensor}, "x")


@dataclass
class Answer:
    logits: torch.Tensor
    loss: float | None = None
    kept: object = None


class Layer:
    def __init__(self):
        self.keys, self.values, self.is_initialized = torch.ones(2), torch.zeros(2), True
        self._private = torch.ones(9)


class Kept:
    """As transformers' caches are: layers in a list, tensors in layers."""

    def __init__(self):
        self.layers = [Layer(), Layer()]


def test_objects_are_looked_into_and_numbers_among_tensors_are_passed_over():
    caches = ["kept.layers.0.keys", "kept.layers.0.values", "kept.layers.1.keys", "kept.layers.1.values"]
    assert list(tensors_of(Answer(torch.ones(2), 1.0, Kept()), "x")) == ["logits", *caches]
    assert list(tensors_of((torch.ones(2), 3, "text", np.ones(2)), "x")) == ["0", "3"]
    assert list(tensors_of({"of": torch.distributions.Normal(torch.ones(2), torch.ones(2))}, "x")) == [
        "of.loc",
        "of.scale",
    ]


def test_objects_among_inputs_are_moved_and_copied():
    given = {"kept": Kept(), "answer": Answer(torch.ones(2), 0.5), "flag": True}
    moved = move(given, device="cpu", dtype=torch.float16)
    assert moved["kept"].layers[1].keys.dtype == moved["answer"].logits.dtype == torch.float16
    assert given["kept"].layers[1].keys.dtype == torch.float32
    assert (moved["answer"].loss, moved["flag"]) == (0.5, True)
    copied = fresh(given)
    copied["kept"].layers[0].keys.add_(1)
    assert given["kept"].layers[0].keys.sum() == 2


def test_a_number_beside_the_tensors_counts_for_the_digest_of_inputs():
    one, two, none = ({"x": torch.ones(2), **more} for more in ({"steps": 1}, {"steps": 2}, {}))
    assert len({inputs_digest(item, "x") for item in (one, two, none)}) == 3
    assert inputs_digest(none, "x") == digest(none)


def test_move_casts_floats_and_leaves_integers():
    moved = move(
        {"ids": torch.ones(2, dtype=torch.int64), "x": [torch.ones(2)], "n": 3}, device="cpu", dtype=torch.bfloat16
    )
    assert (moved["ids"].dtype, moved["x"][0].dtype, moved["n"]) == (torch.int64, torch.bfloat16, 3)


def test_digests_see_values_dtypes_shapes_and_names():
    tensor = torch.arange(4.0)
    seen = {
        digest({"a": tensor}),
        digest({"b": tensor}),
        digest({"a": tensor.view(2, 2)}),
        digest({"a": tensor.half()}),
        digest({"a": tensor + 1}),
    }
    assert len(seen) == 5
    assert digest({"a": tensor.view(2, 2).t().contiguous().t()}) == digest({"a": tensor.view(2, 2)})


@pytest.mark.parametrize(
    ("left", "right"), [((24, 16), (3, 16, 8)), ((3, 4, 16), (3, 16, 8)), ((8, 24), (24, 16)), ((3, 8, 16), (16, 24))]
)
def test_products_of_groups_have_a_float64_reference(left, right):
    """Mixtures of experts are made of them, and torch's own kernel refuses float64."""
    if aten_operator("_grouped_mm") is None:
        pytest.skip(f"torch {torch.__version__} has no _grouped_mm, which came with 2.8")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(*left, generator=generator).bfloat16(), torch.randn(*right, generator=generator).bfloat16()
    offs = None if len(left) == len(right) == 3 else torch.tensor([8, 16, 24], dtype=torch.int32)

    class Experts(nn.Module):
        def forward(self, x, y):
            return torch._grouped_mm(x, y, offs=offs)

    narrow, _, _ = run_cpu(Experts(), (a, b), forward=None, dtype=torch.bfloat16)
    golden, _, _ = run_cpu(Experts(), (a.double(), b.double()), forward=None, dtype=torch.float64)
    assert golden.dtype == torch.float64 and golden.shape == narrow.shape
    assert float((narrow.double() - golden).norm() / golden.norm()) < 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_input_moves_by_one_rounding_up_or_down(dtype):
    ones = torch.ones(1000, dtype=torch.float64)
    moved = moved_by_one_rounding({"x": ones, "ids": torch.arange(3)}, dtype)
    step = (moved["x"] - 1) / roundoff(dtype)
    assert 400 < int((step > 0).sum()) < 600 and torch.equal(moved["ids"], torch.arange(3))
    assert torch.all(step.abs() == 1)
    assert moved_by_one_rounding(torch.arange(3), dtype) is None


def test_a_wide_copy_that_is_filled_again_is_that_of_the_other_dtype():
    models, cpu = Models(), torch.device("cpu")

    def wide(dtype):
        return models.get(
            "key", lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), seed=0, dtype=dtype, device=cpu, wide=True
        )

    first = {name: tensor.clone() for name, tensor in wide(torch.float32).state_dict().items()}
    second = {name: tensor.clone() for name, tensor in wide(torch.bfloat16).state_dict().items()}
    assert all(
        torch.equal(
            second[name],
            first[name].bfloat16().to(first[name].dtype) if first[name].is_floating_point() else first[name],
        )
        for name in first
    )
    assert second["0.weight"].dtype == torch.float64 and not torch.equal(first["0.weight"], second["0.weight"])
    assert all(torch.equal(item, first[name]) for name, item in wide(torch.float32).state_dict().items())
