"""What rows of language models say beside their logits: perplexity, and whether a sample's bits hang on its batch."""

import math

import pytest
import torch
from torch import nn

from harness import Case, open_device, validate
from harness.errors import CaseError
from harness.report import Row, build, render
from harness.run.judged import NO_TOKEN, _perplexities, next_tokens
from harness.run.notes import alone_text


class Reader(nn.Module):
    """Logits of the next token by its embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.table(input_ids))


def inputs(generator):
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(0, 16, (2, 6), generator=generator), "attention_mask": mask}


def case(**more):
    given = dict(name="reader", model=lambda: Reader().eval(), inputs=inputs, decisions="output")
    return Case(**given | dict(next_tokens="input_ids") | more)


# -------- perplexity


def test_the_tokens_that_come_next_are_those_that_the_mask_shows():
    given = inputs(torch.Generator().manual_seed(1))
    ids, result = given["input_ids"], next_tokens(case(), given)
    assert torch.equal(result[0, :-1], ids[0, 1:]) and torch.equal(result[1, :3], ids[1, 1:4])
    assert result[0, -1] == NO_TOKEN and (result[1, 3:] == NO_TOKEN).all()
    assert next_tokens(case(next_tokens=None), given) is None
    assert (next_tokens(case(), {"input_ids": ids})[:, :-1] == ids[:, 1:]).all()


def test_perplexity_is_that_of_the_definition():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = torch.tensor([[1, 4, NO_TOKEN], [0, NO_TOKEN, NO_TOKEN]])
    chances = [math.exp(row[t]) / sum(map(math.exp, row)) for row, t in
               ((logits[0, 0].tolist(), 1), (logits[0, 1].tolist(), 4), (logits[1, 0].tolist(), 0))]  # fmt: skip
    expected = math.exp(-sum(map(math.log, chances)) / 3)
    result = _perplexities(logits * 1.1, logits, targets)
    assert result["expected_perplexity"] == pytest.approx(expected, rel=1e-12)
    assert result["perplexity"] != result["expected_perplexity"]
    assert _perplexities(logits, logits, torch.full((2, 3), NO_TOKEN)) == {} == _perplexities(logits, logits, None)
    assert _perplexities(logits * 1e6, logits, targets)["perplexity"] == math.inf


def test_a_row_holds_the_perplexity_of_both_sides():
    verdict = validate(case(), 1, open_device("cpu"))
    row = Row.of(verdict, test="t", case="reader", dtype="float32", seed=1)
    assert 5 < row.decisions.perplexity == row.decisions.expected_perplexity < 50
    assert Row.from_dict(row.to_dict()).decisions == row.decisions
    text = render(build([row], stack={}, backend="npu"))
    assert f" {row.decisions.perplexity:.4g} |" in text and "perplexity CPU" in text


@pytest.mark.parametrize("given", [torch.ones(2, 3).long(), {"other": 1}, {"input_ids": torch.ones(2, 3)}])
def test_inputs_without_token_ids_are_told(given):
    with pytest.raises(CaseError, match="names no input of token ids"):
        next_tokens(case(), given)


def test_next_tokens_need_decisions():
    with pytest.raises(ValueError, match="next_tokens need `decisions`"):
        case(decisions=None)


# -------- one sample alone, and in its batch


def both(one, other):
    return {"alone": one, "together": other}


def test_a_sample_alone_and_in_its_batch():
    lone = case(decisions=None, next_tokens=None, alone=("alone", "together"))
    same, off = torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.5, 1.0]])
    equal = "batch invariance: a sample alone and in its batch have the same bits on the device and on the CPU"
    assert alone_text(lone, both(same, same), both(same, same)) == equal
    differs = alone_text(lone, both(off, same), both(same, same))
    assert (
        "differ in 1 of 4 elements by at most 5.00e-01 (rel_l2 2.50e-01) on the device, have the same bits" in differs
    )
    assert alone_text(case(), {}, {}) == ""
    with pytest.raises(CaseError, match=r"alone=\('alone', 'together'\), but the outputs are other"):
        alone_text(lone, {"other": same}, both(same, same))
    with pytest.raises(ValueError, match="must name two outputs"):
        case(alone=("alone",))


def test_a_row_says_whether_the_batch_changes_the_bits():
    def forward(model, given):
        first = {name: value[:1] for name, value in given.items()}
        return {"alone": model(**first), "together": model(**given)[:1] + 1e-3}

    lone = case(decisions=None, next_tokens=None, alone=("alone", "together"), forward=forward)
    verdict = validate(lone, 1, open_device("cpu"))
    (note,) = [note for note in verdict.evidence.notes if "batch invariance" in note]
    assert "differ in" in note and "of 96 elements by at most 1.00e-03" in note
