"""What the numeric switches cost: the forecast's price of each, and what the device gives when it is set."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import Case, validate
from harness.devices.switches import NUMERIC_SWITCHES
from harness.judging.verdict import ALL_SWITCHES, SwitchCost
from harness.numerics.expected_error import Rules
from harness.reference import Models
from harness.report import Row, build, render
from harness.report.switches import shown_costs
from harness.run import switches
from harness.run.switches import measured_costs, usable
from harness.tests.needs import emulated_device

NAMES = [switch.name for switch in NUMERIC_SWITCHES]


class Vision(nn.Module):
    """A convolution, attention and a GELU: all that the switches of an Ascend card touch in float32."""

    def __init__(self, gelu="none"):
        super().__init__()
        self.cut, self.up, self.act = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 64), nn.GELU(gelu)

    def forward(self, pixels):
        tokens = self.cut(pixels).flatten(2).transpose(1, 2)
        heads = tokens.unflatten(2, (4, 16)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return self.act(self.up(tokens + mixed))


def pixels(generator):
    return torch.randn(2, 3, 32, 32, generator=generator)


def case(model=Vision, dtype="float32", inputs=pixels):
    return Case(name="vision", model=lambda: model().eval(), inputs=inputs, dtype=dtype)


@pytest.fixture(scope="module")
def emulated():
    return emulated_device()


@pytest.fixture(scope="module")
def priced(emulated):
    models, subject = Models(), case()
    verdict = validate(subject, 42, emulated, models=models)
    return subject, models, verdict


def test_every_switch_that_the_model_feels_is_priced(priced):
    _, _, verdict = priced
    costs = {cost.switch: cost for cost in verdict.evidence.switches}
    assert list(costs) == [
        "convolutions in float32",
        "exact GELU",
        "attention by matrix products",
        ALL_SWITCHES,
    ]  # products are float32 already
    forecast = max(reference.forecast.rel_l2 for reference in verdict.references.values())
    assert all(cost.before == pytest.approx(forecast, rel=1e-6) for cost in costs.values())
    assert costs["convolutions in float32"].after < 0.9 * forecast and costs["exact GELU"].after < 0.9 * forecast
    assert costs[ALL_SWITCHES].after < 3e-7 < 1e-5 < forecast
    assert costs["convolutions in float32"].remedy == "torch.npu.conv.allow_hf32 = False"


def test_the_device_gives_what_the_forecast_says_within_a_fifth(priced, emulated):
    subject, models, verdict = priced
    measured = measured_costs(subject, 42, emulated, verdict.evidence.switches, models)
    assert len(measured) == len(verdict.evidence.switches)
    for cost in measured:
        assert cost.measured_before == pytest.approx(cost.before, rel=0.2)
        assert cost.measured_after == pytest.approx(cost.after, rel=0.2)
        assert cost.before_ms > 0 and cost.after_ms > 0
    assert torch.npu.conv.allow_hf32 is not False  # as it was


class Masked(nn.Module):
    """Attention under a mask of booleans, as transformers gives it of padded texts, and a GELU."""

    def __init__(self):
        super().__init__()
        self.up, self.act = nn.Linear(64, 64), nn.GELU()

    def forward(self, tokens):  # (B, N, 64) to the same
        heads = self.up(tokens).unflatten(2, (4, 16)).transpose(1, 2)
        seen = torch.ones(tokens.shape[1], device=tokens.device).cumsum(0) <= tokens.shape[1] // 2
        mixed = F.scaled_dot_product_attention(4 * heads, heads, heads, attn_mask=seen[None, None, None])
        return self.act(mixed.transpose(1, 2).flatten(2))


def test_attention_under_a_mask_of_booleans_is_measured_as_it_is_expected(emulated):
    models = Models()
    subject = case(Masked, inputs=lambda generator: torch.randn(2, 16, 64, generator=generator))
    expected = validate(subject, 42, emulated, models=models).evidence.switches
    assert "attention by matrix products" in {cost.switch for cost in expected}
    for cost in measured_costs(subject, 42, emulated, expected, models):
        assert cost.measured_after == pytest.approx(cost.after, rel=0.2), cost.switch


def test_one_row_of_a_model_and_dtype_says_it(priced, emulated):
    subject, models, verdict = priced
    assert verdict.evidence.switches
    assert validate(subject, 123, emulated, models=models).evidence.switches == ()


def test_a_half_dtype_whose_own_roundings_cost_more_has_no_prices(emulated):
    assert validate(case(dtype="float16"), 42, emulated).evidence.switches == ()


def test_a_model_without_anything_that_a_switch_touches_has_no_prices(emulated):
    plain = case(lambda: nn.Sequential(nn.Linear(8, 8), nn.SiLU()), inputs=lambda g: torch.randn(4, 8, generator=g))
    assert validate(plain, 42, emulated).evidence.switches == ()


@pytest.mark.parametrize(("times", "priced"), [(1.99, False), (2.01, True)])
def test_prices_begin_at_twice_the_error_of_the_cpu(emulated, monkeypatch, times, priced):
    """The forecast's error over the CPU's own: on either side of `PRICED_FROM`."""
    errors = iter([times, 1.0, *[0.5] * 9])
    monkeypatch.setattr(switches, "largest_error", lambda *_: next(errors))
    assert bool(validate(case(), 42, emulated).evidence.switches) is priced


@pytest.mark.parametrize(("second", "together"), [(9.91, False), (9.89, True), (10.11, True)])
def test_all_switches_together_have_a_price_where_two_or_more_are_felt(emulated, monkeypatch, second, together):
    """The error is 10, with the first switch 5, with another `second`, with any further one as before."""
    errors = iter([10.0, 1.0, 5.0, second, *[10.0] * 9])
    monkeypatch.setattr(switches, "largest_error", lambda *_: next(errors))
    costs = validate(case(), 42, emulated).evidence.switches
    assert len(costs) > 2 and (costs[-1].switch == ALL_SWITCHES) is together
    assert [item.felt for item in costs[:2]] == [True, together]


def test_switches_that_are_set_or_that_nothing_calls_are_left_out():
    ascend = Rules(conv="HF32")
    every = {"aten::convolution_overrideable", "aten::gelu", "aten::addmm", "aten::scaled_dot_product_attention"}
    assert [switch.name for switch in usable(ascend, every)] == [NAMES[0], NAMES[2], NAMES[3]]
    assert [switch.name for switch in usable(Rules(conv="HF32", matmul="HF32"), every)] == NAMES
    assert [switch.name for switch in usable(ascend, {"aten::gelu"})] == ["exact GELU"]
    assert usable(Rules(gelu_tanh=False, fused_attention=False), every) == ()


def cost(name, before, after):
    return SwitchCost(switch=name, before=before, after=after, remedy="do it")


def test_a_switch_that_changes_less_than_a_hundredth_is_not_shown():
    felt, unfelt = cost("one", 1.0, 0.98), cost("two", 1.0, 0.995)
    assert shown_costs([felt, unfelt, cost(ALL_SWITCHES, 1.0, 0.97)]) == [felt]
    assert shown_costs([felt, felt, cost(ALL_SWITCHES, 1.0, 0.5)]) == [felt, felt, cost(ALL_SWITCHES, 1.0, 0.5)]
    assert shown_costs([unfelt]) == [] and shown_costs([]) == []


@pytest.mark.parametrize(("off", "shown"), [(1.19, False), (1.21, True), (math.nan, True)])
def test_a_switch_whose_measured_error_is_not_the_expected_one_is_shown(off, shown):
    measured = replace(cost("two", 1.0, 0.995), measured_before=1.0, measured_after=0.995 * off)
    assert shown_costs([measured]) == ([measured] if shown else [])
    together = replace(measured, switch=ALL_SWITCHES)
    assert shown_costs([cost("two", 1.0, 0.995), together]) == ([together] if shown else [])


@pytest.mark.parametrize("html", [False, True])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_report_has_a_table_of_them(priced, lang, html):
    _, _, verdict = priced
    row = Row.of(verdict, test="t::test_precision[a]", case="vision", dtype="float32", seed=42)
    again = Row.from_dict(row.to_dict())
    assert again.switches == row.switches and len(row.switches) == 4
    text = render(build([again], stack={"device": "Ascend910B4"}, backend="npu"), lang=lang, html=html)
    assert {"en": "What the switches cost", "zh": "各开关的精度代价"}[lang] in text
    assert {"en": "exact GELU", "zh": "精确的 GELU"}[lang] in text
    assert "torch.npu.conv.allow" in text
    assert lang == "en" or "exact GELU" not in text


def test_without_float64_there_are_no_prices(emulated, monkeypatch):
    monkeypatch.setattr(switches, "largest_error", lambda *_: None)
    assert validate(case(), 42, emulated).evidence.switches == ()
    monkeypatch.setattr(switches, "largest_error", lambda *_: math.nan)
    assert validate(case(), 42, emulated).evidence.switches == ()
