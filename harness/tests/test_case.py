"""validate(): the deep function, on the CPU as its own device and on one that errs on purpose."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from harness import Case, Tolerance, open_device, validate
from harness.devices import Device, Watched
from harness.errors import CaseError
from harness.reference import Models

TIGHT = Tolerance(max_diff=0.0, cos_sim=1.0)


def case(**more):
    given = dict(
        name="small",
        model=lambda: nn.Linear(8, 4),
        inputs=lambda generator: torch.randn(3, 8, generator=generator),
        tolerance=TIGHT,
    )
    return Case(**(given | more))


class Broken(Device):
    """A device that is the CPU; a model's `forward` may ask whether it runs there, and return something else."""

    generator = None

    stack = open_device("cpu").stack

    def __init__(self, fell_back=()):
        super().__init__(name="Broken", backend="npu", torch_device=torch.device("cpu"), reason="a test asked for it")
        object.__setattr__(self, "fell_back", list(fell_back))
        object.__setattr__(self, "runs", False)  # whether the model runs on the device now

    def synchronize(self):
        object.__setattr__(self, "runs", not self.runs)  # before a run and after it

    @contextmanager
    def watch(self):
        yield Watched(fell_back=list(self.fell_back))


def test_the_cpu_agrees_with_itself_exactly():
    verdict = validate(case(), 42, open_device("cpu"))
    assert verdict.passed
    assert verdict.comparison.max_diff == 0.0
    assert verdict.evidence.weights == "seeded:0"
    assert verdict.evidence.expected_sha256 == verdict.evidence.actual_sha256
    assert verdict.evidence.expected_ms > 0 and verdict.evidence.actual_ms > 0


def test_inputs_follow_the_seed():
    device, models = open_device("cpu"), Models()
    digests = [validate(case(), seed, device, models=models).evidence.inputs_sha256 for seed in (1, 2, 1)]
    assert digests[0] == digests[2] != digests[1]


def test_an_operator_that_fell_back_fails_whatever_the_numbers():
    verdict = validate(case(), 42, Broken(fell_back=["aten::special_i0"]))
    assert verdict.comparison.max_diff == 0.0
    assert verdict.status == "FAIL"
    assert verdict.marks == ("FELL BACK",)
    assert "aten::special_i0" in str(verdict.reasons[0]) and "CPU was compared with CPU" in str(verdict.reasons[0])


def test_a_fallback_that_a_case_allows_is_marked_and_no_other_passes():
    allowed = replace(case(), fallbacks=("aten::special_i0",))
    verdict = validate(allowed, 42, Broken(fell_back=["aten::special_i0"]))
    assert verdict.passed and verdict.marks == ("FELL BACK",)
    verdict = validate(allowed, 42, Broken(fell_back=["aten::special_i0", "aten::i0"]))
    assert (
        verdict.status == "FAIL" and "aten::i0;" in str(verdict.reasons[0]) and "special" not in str(verdict.reasons[0])
    )


def test_several_outputs_are_compared_by_name():
    broken = Broken()

    def forward(model, x):
        pooled = model(x).mean(0)
        return {"features": model(x), "pooled": pooled + broken.runs, "ids": torch.arange(3)}

    verdict = validate(case(forward=forward), 42, broken)
    assert sorted(verdict.comparisons) == ["features", "ids", "pooled"]
    assert verdict.output == "pooled"
    assert {reason.output for reason in verdict.failures} == {"pooled"}


def test_decisions_and_accuracy_of_both_sides():
    labels = torch.tensor([0, 1, 2])
    broken = Broken()

    def forward(model, x):
        logits = torch.eye(4)[[0, 1, 3]].clone()
        if broken.runs:
            logits[0] = torch.tensor([0.0, 9.0, 0.0, 0.0])
        return logits

    loose = Tolerance(max_diff=100.0, top1=1.0)
    verdict = validate(case(forward=forward, decisions="output", labels=labels, tolerance=loose), 42, broken)
    assert (verdict.decisions.agree, verdict.decisions.correct_actual, verdict.decisions.correct_expected) == (2, 1, 2)
    assert verdict.decisions.first == (0, 1, 0)
    assert [reason.criterion for reason in verdict.failures] == ["top1"]


def test_limits_may_depend_on_dtype_and_switches():
    by_dtype = case(tolerance={"float32": TIGHT, "bfloat16": Tolerance(max_diff=1.0)}, dtype="bfloat16")
    assert by_dtype.limits(None).max_diff == 1.0
    by_stack = case(tolerance=lambda dtype, stack: Tolerance(max_diff=0.5 if stack == "HF32" else 0.1))
    assert (by_stack.limits("HF32").max_diff, by_stack.limits(None).max_diff) == (0.5, 0.1)


def test_either_of_two_equal_logits_is_the_decision():
    expected = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    actual = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 1.0], [2.0, 1.0, 1.0]])  # the second, the first, none of the two
    broken = Broken()

    def forward(model, x):
        return actual if broken.runs else expected

    verdict = validate(
        case(
            forward=forward,
            decisions="output",
            labels=torch.tensor([1, 1, 1]),
            tolerance=Tolerance(max_diff=9.0, top1=1.0),
        ),
        42,
        broken,
    )
    result = verdict.decisions
    assert (result.agree, result.correct_actual, result.correct_expected) == (2, 1, 3) and result.first[0] == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dtype": "int64"}, "must be a floating-point dtype"),
        ({"dtype": "float99"}, "must be a floating-point dtype"),
        ({"labels": torch.ones(3)}, "labels need `decisions`"),
        ({"tolerance": {"float16": TIGHT}}, "no tolerance for float32; there are float16"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused_when_it_is_made(more, words):
    with pytest.raises(ValueError, match=words):
        case(**more)


def test_decisions_on_an_output_that_is_not_there_are_refused():
    with pytest.raises(CaseError, match="decisions='logits', but the outputs are output"):
        validate(case(decisions="logits"), 42, Broken())
    with pytest.raises(CaseError, match="5 labels for 3 decisions"):
        validate(case(decisions="output", labels=torch.zeros(5)), 42, Broken())


def test_the_share_of_the_largest_logits_that_both_have_is_counted():
    expected = torch.arange(20.0).repeat(2, 1)
    actual = expected.clone()
    actual[0, 0], actual[0, 17] = 18.5, 0.0  # one of the five largest is another
    broken = Broken()
    given = case(
        forward=lambda model, x: actual if broken.runs else expected,
        decisions="output",
        tolerance=Tolerance(max_diff=99.0),
    )
    verdict = validate(given, 42, broken)
    assert (verdict.decisions.k, verdict.decisions.topk, verdict.decisions.top1) == (5, 0.9, 1.0)


def test_differences_look_closer_where_something_differs():
    from harness.run.repeats import differences

    nan, plain = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    assert differences({"a": plain.clone(), "b": nan.clone()}, {"a": plain, "b": nan}) == {}
    assert differences({"a": plain.half()}, {"a": plain}) == {}  # other dtypes, the same numbers
    assert differences({"a": plain + 1}, {"a": plain, "b": nan})["unequal"] == 2
    assert differences({"a": plain[:1]}, {"a": plain})
    assert differences({"a": nan}, {"a": plain})["unequal"] == 1


@pytest.mark.parametrize("inputs", [lambda: torch.ones(2, 4), lambda generator, more: torch.ones(2, 4)])
def test_inputs_that_cannot_be_called_with_a_generator_are_refused_with_what_to_write(inputs):
    wrong = replace(case(), inputs=inputs)
    with pytest.raises(CaseError, match=r"inputs is called with one argument, a torch.Generator, .*; write inputs="):
        validate(wrong, 42, open_device("cpu"))


def test_inputs_may_take_more_than_a_generator_where_it_has_a_default():
    assert validate(
        replace(case(), inputs=lambda generator, size=8: torch.randn(2, size, generator=generator)),
        42,
        open_device("cpu"),
    )
