"""The model: its sizes, its maths against transformers, and that a mistake in either would show."""

import copy

import pytest
import torch
from torch.nn import functional as F

from harness import compare
from harness.models import aimv2
from harness.models.aimv2 import VARIANTS, AIMv2, AIMv2Config, build
from harness.tests.reference_aimv2 import in_float64, transformers_model

SMALL = dict(width=64, depth=3, heads=4, hidden=176)
KINDS = {"plain": dict(image_size=56), "head": dict(image_size=56, pool=True), "native": dict(image_size=None)}
COUNTS = {  # parameters of the released variants, as Apple's own constructors give them
    "aimv2-large-patch14-224": 309_197_824,
    "aimv2-large-patch14-336": 309_525_504,
    "aimv2-large-patch14-448": 309_984_256,
    "aimv2-large-patch14-224-distilled": 309_197_824,
    "aimv2-large-patch14-336-distilled": 309_525_504,
    "aimv2-large-patch14-native": 308_935_680,
    "aimv2-huge-patch14-224": 680_851_968,
    "aimv2-huge-patch14-336": 681_343_488,
    "aimv2-huge-patch14-448": 682_031_616,
    "aimv2-1B-patch14-224": 1_234_958_336,
    "aimv2-1B-patch14-336": 1_235_613_696,
    "aimv2-1B-patch14-448": 1_236_531_200,
    "aimv2-3B-patch14-224": 2_720_658_432,
    "aimv2-3B-patch14-336": 2_721_641_472,
    "aimv2-3B-patch14-448": 2_723_017_728,
    "aimv2-large-patch14-224-lit": 309_197_824 + 3 * 1024**2 + 2 * 1024,
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Ours and transformers' on the same weights, and a picture: 56 pixels, or none of a square at native
    resolution.
    """
    ours = build(AIMv2Config(**SMALL, **KINDS[request.param]), 1)
    size = (42, 70) if request.param == "native" else (56, 56)
    return ours, transformers_model(ours, tmp_path_factory.mktemp(request.param)), noise(2, 3, *size)


def outputs(ours, theirs, x):
    """(ours, theirs) of the features, and of the pooled ones where there is a head."""
    with torch.no_grad():
        result, reference = ours(x), theirs(x)
        pairs = [(result, reference.last_hidden_state)]
        return pairs + ([(ours.pool(result), reference.pooler_output)] if ours.config.pool else [])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_released_variant_has_its_published_size(name):
    with torch.device("meta"):
        model = AIMv2(VARIANTS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_agrees_with_transformers_in_float32(pair):
    for ours, theirs in outputs(*pair):
        assert compare(ours, theirs).max_diff <= 2e-5


def test_agrees_with_transformers_in_float64(pair):
    ours, theirs, x = pair
    for result, reference in outputs(copy.deepcopy(ours).double(), in_float64(copy.deepcopy(theirs)), x.double()):
        assert result.dtype == torch.float64
        assert compare(result, reference).max_diff <= 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_runs_in_half_dtypes(pair, dtype, limit):
    ours, _, x = pair
    with torch.no_grad():
        result = copy.deepcopy(ours).to(dtype)(x.to(dtype))
        assert result.dtype == dtype
        assert 0 < compare(result, ours(x)).rel_l2 < limit


def swapped(*pairs):
    """A fault: tensors of every block that change places."""

    def plant(model):
        for block in model.trunk.blocks:
            for first, second in pairs:
                left, right = block.get_parameter(first).data, block.get_parameter(second).data
                kept = left.clone()
                left.copy_(right)
                right.copy_(kept)

    return plant


def rows_of_qkv(reorder):
    def plant(model):
        for block in model.trunk.blocks:
            weight = block.attn.qkv.weight.data
            weight.copy_(reorder(weight.clone()))

    return plant


def parts(order):
    return rows_of_qkv(lambda weight: torch.cat([weight.chunk(3)[part] for part in order]))


def heads_first(weight):
    return weight.view(3, 4, 16, 64).transpose(0, 1).reshape(192, 64)


def patch_weight(change):
    def plant(model):
        weight = model.preprocessor.patchifier.proj.weight.data
        weight.copy_(change(weight.clone()))

    return plant


def transposed(model):
    for block in model.trunk.blocks:
        block.attn.proj.weight.data.copy_(block.attn.proj.weight.data.t().clone())


def without(name):
    def plant(model):
        for parameter, value in model.named_parameters():
            if parameter.endswith(name):
                value.data.fill_(1.0 if "norm" in parameter else 0.0)

    return plant


def function_replaced(name, replacement):
    """A fault in the maths, not in the weights: an operator that the model calls."""

    def plant(model):
        return lambda monkeypatch: monkeypatch.setattr(aimv2.F, name, replacement)

    return plant


def causal(q, k, v, **options):
    return REAL_ATTENTION(q, k, v, is_causal=True)


def other_scale(q, k, v, **options):
    return REAL_ATTENTION(q, k, v, scale=64**-0.5)


REAL_ATTENTION, REAL_NORM = F.scaled_dot_product_attention, F.rms_norm
MISTAKES = {
    "q and k swapped": parts((1, 0, 2)),
    "q and v swapped": parts((2, 1, 0)),
    "k and v swapped": parts((0, 2, 1)),
    "qkv heads first": rows_of_qkv(heads_first),
    "gate and up swapped": swapped(("mlp.fc1.weight", "mlp.fc3.weight")),
    "norms of a block swapped": swapped(("norm_1.weight", "norm_2.weight")),
    "BGR": patch_weight(lambda w: w.flip(1)),
    "kernel transposed": patch_weight(lambda w: w.transpose(2, 3)),
    "no patch bias": without("patchifier.proj.bias"),
    "no patch norm": without("patchifier.norm.weight"),
    "no positions": without("pos_embed"),
    "no last norm": without("post_trunk_norm.weight"),
    "projection transposed": transposed,
    "GELU for SiLU": function_replaced("silu", F.gelu),
    "causal attention": function_replaced("scaled_dot_product_attention", causal),
    "another scale": function_replaced("scaled_dot_product_attention", other_scale),
    "eps of 1e-6": function_replaced("rms_norm", lambda x, shape, weight, eps: REAL_NORM(x, shape, weight, 1e-6)),
    "no norm weight": function_replaced("rms_norm", lambda x, shape, weight, eps: REAL_NORM(x, shape, None, eps)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_far_outside_rounding(name, monkeypatch):
    """In float64, where what a mistake moves is the same on every host: its rounding is below 1e-12, at which the
    agreement with transformers is held. The smallest mistake, an eps of 1e-6 for 1e-5, moves 1 / sqrt(m + eps) by
    4.5e-6 / m of a mean square m."""
    right, wrong = (build(AIMv2Config(**SMALL, image_size=56), 1).double() for _ in range(2))
    x = noise(2, 3, 56, 56).double()
    with torch.no_grad():
        expected = right(x)
        patch = MISTAKES[name](wrong)
        if callable(patch):
            patch(monkeypatch)
        result = compare(wrong(x), expected).rel_l2
    assert result > (1e-6 if name == "eps of 1e-6" else 1e-2)


def test_one_swapped_layer_of_the_last_kind_shows():
    right, wrong = (build(AIMv2Config(**SMALL, image_size=56), 1) for _ in range(2))
    weight = wrong.trunk.blocks[-1].attn.qkv.weight.data
    weight.copy_(torch.cat([weight.chunk(3)[part] for part in (1, 0, 2)]))
    with torch.no_grad():
        assert compare(wrong(noise(1, 3, 56, 56)), right(noise(1, 3, 56, 56))).rel_l2 > 1e-3


def test_a_picture_of_another_size_is_refused_with_both_sizes():
    model = build(AIMv2Config(**SMALL, image_size=56), 0)
    with pytest.raises(ValueError, match="56"):
        model(noise(1, 3, 42, 42))
    with pytest.raises(ValueError, match="no attention-pool head"):
        model.pool(noise(1, 16, 64))


def test_seeded_weights_are_the_same_for_one_seed_and_differ_for_another():
    config = AIMv2Config(**SMALL, image_size=56)
    first, again, other = (build(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(ValueError, match="no AIMv2 is called 'aimv2-tiny'; there are aimv2-1B"):
        build("aimv2-tiny")
