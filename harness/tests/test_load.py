"""load(): strictly, in any layout, with what the config says or the shapes of a released variant."""

import json

import pytest
import torch

from harness import compare
from harness.checkpoints.conversion import CheckpointError
from harness.models.aimv2 import build, convert_checkpoint, load
from harness.tests.checkpoints import KINDS, model, write

PLACES = [
    (kind, layout)
    for kind in KINDS
    for layout in ("apple", "transformers", "timm")
    if (kind, layout) != ("head", "timm")
]


@pytest.mark.parametrize(("kind", "layout"), PLACES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_gives_the_same_model(tmp_path, kind, layout, shards):
    expected = model(kind)
    source = write(tmp_path / "source", expected.state_dict(), shards=shards)
    if layout != "apple":
        convert_checkpoint(source, tmp_path / "there", to=layout)
        source = tmp_path / "there"
    result = load(source)
    assert result.config == expected.config
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in result.state_dict().items())
    assert not result.training and not any(parameter.requires_grad for parameter in result.parameters())
    x = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert compare(result(x), expected(x)).max_diff == 0.0


def test_a_file_is_as_good_as_its_directory(tmp_path):
    source = write(tmp_path / "source", model().state_dict())
    assert load(source / "model.safetensors").config == load(str(source)).config


def test_dtypes_are_kept_or_asked_for(tmp_path):
    tensors = {name: value.bfloat16() for name, value in model().state_dict().items()}
    source = write(tmp_path / "source", tensors)
    assert load(source).trunk.post_trunk_norm.weight.dtype == torch.bfloat16
    assert load(source, dtype=torch.float64).trunk.post_trunk_norm.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="computes in a floating-point dtype"):
        load(source, dtype=torch.int8)
    mixed = write(tmp_path / "mixed", tensors | {"trunk.post_trunk_norm.weight": torch.ones(64)})
    with pytest.raises(CheckpointError, match="mixes BF16, F32: say which one"):
        load(mixed)
    assert load(mixed, dtype=torch.float32).trunk.post_trunk_norm.weight.dtype == torch.float32


def test_heads_and_eps_come_from_the_config(tmp_path):
    source = write(tmp_path / "source", model().state_dict(), num_attention_heads=8, rms_norm_eps=1e-6)
    assert (load(source).config.heads, load(source).config.eps) == (8, 1e-6)


def test_without_a_config_sizes_of_no_variant_say_what_is_missing(tmp_path):
    source = write(tmp_path / "source", model().state_dict(), config=False)
    with pytest.raises(
        CheckpointError,
        match="num_attention_heads of .*config.json is missing and these sizes are no released variant's",
    ):
        load(source)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 128}, "hidden_size is 128 and the weights say 64"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4 and the weights say 3"),
        ({"image_size": 224}, "image_size is 224 and the weights say 56"),
        ({"is_native": True}, "is_native is True and the weights have learned positions"),
        ({"qkv_bias": True}, "qkv_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu where silu was expected"),
        ({"num_attention_heads": 7}, "is 7: the number of heads, which divides the width 64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, fields, words):
    with pytest.raises(CheckpointError, match=words):
        load(write(tmp_path / "source", model().state_dict(), **fields))


def test_a_config_that_is_no_config_is_refused(tmp_path):
    source = write(tmp_path / "source", model().state_dict())
    for text in ("{", "[]", json.dumps("x")):
        (source / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="is not a config"):
            load(source)


@pytest.mark.parametrize(
    "missing",
    [
        "trunk.blocks.0.mlp.fc1.weight",
        "preprocessor.patchifier.proj.weight",
        "trunk.post_trunk_norm.weight",
        "preprocessor.patchifier.proj.bias",
    ],
)
def test_a_weight_is_never_left_random(tmp_path, missing):
    tensors = dict(model().state_dict())
    del tensors[missing]
    with pytest.raises(CheckpointError, match=missing):
        load(write(tmp_path / "source", tensors))


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no such model"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        load(tmp_path / "empty")


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    other = {"bert.embeddings.word_embeddings.weight": torch.ones(3, 2), "bert.pooler.dense.bias": torch.ones(2)}
    with pytest.raises(CheckpointError, match="this is no AIMv2 checkpoint: its 2 keys"):
        load(write(tmp_path / "bert", other))


def test_full_size_weights_load_quickly_enough_to_be_used(tmp_path):
    """A large model in bfloat16, 0.6 GB, through a shard or two: every tensor arrives."""
    tensors = {name: value.bfloat16() for name, value in build("aimv2-large-patch14-224", 0).state_dict().items()}
    source = write(tmp_path / "large", tensors, shards=2, config=False)
    result = load(source)
    assert result.config.heads == 8
    assert all(torch.equal(value, tensors[name]) for name, value in result.state_dict().items())
