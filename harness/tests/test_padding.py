"""What a model returns at positions of padding is not judged: no attention defines it, and devices differ there."""

import pytest
import torch

from harness import Case, Tolerance, validate
from harness.case import Case as CaseType
from harness.checkpoints.padding import NOTE, without_padding
from harness.conformance.checkpoints import known
from harness.emulator.table import changed
from harness.reference import Models
from harness.run.judged import _decide
from harness.tests.needs import emulated_device, import_transformers

LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def corrected(real):
    """Fused attention as it was called before torch_npu asked for zeros in rows that see no key."""

    def compute(*args, out):
        return real(*args[:14], 0, *args[15:], out=out)

    return compute


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    import_transformers()
    path = tmp_path_factory.mktemp("checkpoints") / "mistral"
    known()["mistral"](path)  # it has no tokenizer, so a quarter of the first text is padding
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", ["forward", "batch"])
def test_a_device_with_other_values_at_padding_is_sound(mistral, dtype, part):
    with changed("aclnnFlashAttentionScore", corrected):
        case = Case.from_checkpoint(mistral, part=part, dtype=dtype)
        verdict = validate(case, 42, emulated_device(), models=Models())
        assert verdict.passed, verdict.reasons
        assert NOTE in verdict.evidence.notes
        plain = CaseType(
            name="plain", model=case.model, inputs=case.inputs, dtype=dtype, tolerance=Tolerance(preset="floor")
        )
        assert validate(plain, 42, emulated_device(), models=Models()).status == "FAIL"  # the plant acts


def test_a_fault_beside_the_padding_is_still_seen(mistral):
    def scaled(real):
        def compute(*args, out):
            result = real(*args, out=out)
            result[3] = result[3] * 1.001
            return result

        return compute

    with changed("aclnnFlashAttentionScore", scaled):
        case = Case.from_checkpoint(mistral, dtype="float32")
        assert validate(case, 42, emulated_device(), models=Models()).status == "FAIL"


def test_outputs_of_tokens_are_zero_at_padding_and_others_stay():
    given = {
        "logits": torch.ones(2, 4, 3),
        "start_logits": torch.full((2, 4), torch.nan),
        "pooled": torch.ones(2, 4),
        "vision_states": torch.ones(2, 4, 3),
        "hidden_states": (torch.ones(2, 4, 5), torch.ones(2, 5, 5)),
        "nested": {"last_hidden_state": torch.ones(2, 4, 3)},
    }
    result = without_padding(given, {"attention_mask": LEFT})
    assert torch.equal(result["logits"], LEFT[..., None].expand(2, 4, 3).float())
    assert torch.equal(result["nested"]["last_hidden_state"], result["logits"])
    assert result["start_logits"].isnan().sum() == 6 and not result["start_logits"][0, :2].any()
    for name in ("pooled", "vision_states"):
        assert torch.equal(result[name], given[name])
    assert not result["hidden_states"][0][0, :2].any() and result["hidden_states"][1].all()
    assert without_padding(given["logits"], {}) is given["logits"]


def test_an_encoder_and_its_decoder_have_masks_of_their_own():
    given = {"logits": torch.ones(2, 4, 3), "encoder_last_hidden_state": torch.ones(2, 4, 3)}
    masks = {"attention_mask": LEFT, "decoder_input_ids": torch.zeros(2, 4)}
    result = without_padding(given, masks)
    assert result["logits"].all() and not result["encoder_last_hidden_state"][0, :2].any()
    result = without_padding(given, masks | {"decoder_attention_mask": LEFT.flip(1)})
    assert not result["logits"][0, 2:].any() and result["logits"][0, :2].all()


def test_rows_of_zeros_decide_nothing():
    expected = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)) * LEFT[..., None]
    actual = expected.clone()
    actual[0, 2] = -actual[0, 2]
    case = Case(name="m", model=torch.nn.Identity, inputs=lambda generator: None, decisions="logits")
    decisions = _decide(case, {"logits": actual}, {"logits": expected})
    assert (decisions.count, decisions.agree) == (6, 5) and decisions.first[0] == 2  # the place among all rows
    only_there = _decide(case, {"logits": torch.ones_like(expected)}, {"logits": torch.zeros_like(expected)})
    assert only_there.count == 8  # zero on one side alone: a difference
