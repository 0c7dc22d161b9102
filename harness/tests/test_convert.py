"""Conversion: every direction and back, to the bit; whole directories or none; hostile files in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoints.conversion import CheckpointError, Rename, checkpoint_digest, read_header
from harness.checkpoints.recognition import recognise
from harness.models.aimv2 import build, convert_checkpoint, layout_of, load
from harness.models.aimv2_layouts import LAYOUTS, Layout, layout_names
from harness.tests.checkpoints import KINDS, model, write, write_raw

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors_in(folder):
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= load_file(path)
    return result


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_way_and_back_is_exact_to_the_bit(tmp_path, kind, dtype, shards):
    tensors = {name: value.to(dtype) for name, value in model(kind).state_dict().items()}
    tensors["trunk.post_trunk_norm.weight"][0] = float("nan")  # bits, not numbers
    source = write(tmp_path / "apple", tensors, shards=shards)
    layouts = ["transformers"] if kind == "head" else ["transformers", "timm"]
    for first in layouts:
        convert_checkpoint(source, tmp_path / first, to=first)
        for second in ["apple", *layouts]:
            target = tmp_path / f"{first}-{second}"
            convert_checkpoint(tmp_path / first, target, to=second)
            convert_checkpoint(target, tmp_path / f"{first}-{second}-apple", to="apple")
            back = tensors_in(tmp_path / f"{first}-{second}-apple")
            assert back.keys() == tensors.keys()
            assert all(
                torch.equal(back[name].view(torch.uint8), tensors[name].contiguous().view(torch.uint8))
                for name in tensors
            )
    assert len(list((tmp_path / "transformers").glob("*.safetensors"))) == shards
    assert (tmp_path / "transformers" / "model.safetensors.index.json").exists() == (shards > 1)


def test_names_and_shapes_are_those_of_the_layouts(tmp_path):
    source = write(tmp_path / "apple", model().state_dict())
    words = convert_checkpoint(source, tmp_path / "transformers", to="transformers")
    result = tensors_in(tmp_path / "transformers")
    assert result["embeddings.position_embedding.weight"].shape == (16, 64)
    assert torch.equal(
        result["encoder.layers.2.attention.k_proj.weight"], tensors_in(source)["trunk.blocks.2.attn.qkv.weight"][64:128]
    )
    assert torch.equal(
        result["encoder.layers.0.ffn.gate_proj.weight"], tensors_in(source)["trunk.blocks.0.mlp.fc1.weight"]
    )
    assert "32 tensors" in words and "(apple)" in words and "(transformers)" in words
    convert_checkpoint(source, tmp_path / "timm", to="timm")
    assert tensors_in(tmp_path / "timm").keys() >= {
        "pos_embed",
        "blocks.0.mlp.fc1_g.weight",
        "patch_embed.norm.weight",
        "norm.weight",
    }


def test_a_layout_is_declared_once(tmp_path, monkeypatch):
    """One more layout in the table is written, read, recognised, and named by messages and help."""
    mine = Layout(
        name="mine",
        rules=tuple(Rename(f"net.{rule.own}", rule.model) for rule in LAYOUTS["timm"].rules),
        first_words=("net.patch_embed.", "net.blocks."),
        tower_class={"architectures": ["MineModel"]},
        own_fields={"mine_width": lambda config: config.width},
    )
    monkeypatch.setitem(LAYOUTS, "mine", mine)
    source = write(tmp_path / "apple", model().state_dict())
    assert "(apple)" in convert_checkpoint(source, tmp_path / "mine", to="mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["mine_width"] == 64 and config["architectures"] == ["MineModel"] and "use_bias" not in config
    assert layout_of(tensors_in(tmp_path / "mine")) == "mine" and recognise(tmp_path / "mine").kind == "AIMv2"
    assert "(mine)" in convert_checkpoint(tmp_path / "mine", tmp_path / "back", to="apple")
    assert same(tensors_in(tmp_path / "back"), tensors_in(source))
    assert "mine_width" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert layout_names() == "apple, transformers, timm or mine"
    with pytest.raises(CheckpointError, match=r"timm \(.*\) and mine \(net.patch_embed., net.blocks.\)"):
        layout_of(["bert.a"])


def test_the_config_goes_with_it_and_keeps_what_it_had(tmp_path):
    source = write(
        tmp_path / "apple", model("head").state_dict(), initializer_range=0.01, comment=["kept"], use_bias=False
    )
    convert_checkpoint(source, tmp_path / "there", to="transformers")
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert (config["model_type"], config["use_head"], config["is_native"], config["hidden_act"]) == (
        "aimv2_vision_model",
        True,
        False,
        "silu",
    )
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"], config["image_size"]) == (
        64,
        3,
        176,
        56,
    )
    assert config["comment"] == ["kept"] and "use_bias" not in config
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="apple")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["model_type"], back["use_bias"], back["initializer_range"]) == ("aimv2", False, 0.01)
    assert "use_head" not in back


def test_timm_has_no_place_for_the_head(tmp_path):
    source = write(tmp_path / "apple", model("head").state_dict())
    with pytest.raises(CheckpointError, match="timm layout has no place for head.cls_token, head.k.weight"):
        convert_checkpoint(source, tmp_path / "timm", to="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


def lit():
    """A small lit checkpoint in Apple's layout."""
    vision = {f"image_encoder.{name}": value for name, value in model("head").state_dict().items()}
    text = {}
    for name, value in model("plain", seed=2).state_dict().items():
        if name.startswith("trunk"):
            text[f"text_encoder.{name}"] = value[:0].new_empty(value.shape).copy_(value)
    text["text_encoder.preprocessor.text_embedding.weight"] = torch.randn(50, 64)
    text["text_encoder.preprocessor.positional_embedding"] = torch.randn(7, 64)
    joint = {
        "image_projector.weight": torch.randn(32, 64),
        "text_projector.weight": torch.randn(32, 64),
        "log_logit_scale": torch.tensor(2.0),
    }
    return vision | text | joint


def test_lit_goes_both_ways_and_loads_its_image_tower(tmp_path):
    tensors = lit()
    source = write(
        tmp_path / "apple", tensors, vision_config={"num_attention_heads": 4}, text_config={"num_attention_heads": 2}
    )
    convert_checkpoint(source, tmp_path / "there", to="transformers")
    result = tensors_in(tmp_path / "there")
    assert {"logit_scale", "visual_projection.weight", "text_model.embeddings.token_embedding.weight"} <= result.keys()
    assert result["text_model.encoder.layers.0.attention.q_proj.weight"].shape == (64, 64)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", to="apple")
    assert same(tensors_in(tmp_path / "back"), tensors)
    for folder in (source, tmp_path / "there"):
        assert same(dict(load(folder).state_dict()), dict(model("head").state_dict()))
    with pytest.raises(CheckpointError, match="timm layout has no place for"):
        convert_checkpoint(source, tmp_path / "timm", to="timm")


def test_a_released_variant_needs_no_config(tmp_path):
    tensors = build("aimv2-large-patch14-224", 0).state_dict()
    tiny = {name: value[:1].expand(value.shape) if value.dim() else value for name, value in tensors.items()}
    source = write(
        tmp_path / "apple", {name: value.to(torch.float8_e4m3fn) for name, value in tiny.items()}, config=False
    )
    convert_checkpoint(source, tmp_path / "there", to="transformers")
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert (config["num_attention_heads"], config["hidden_size"], config["rms_norm_eps"]) == (8, 1024, 1e-5)
    with pytest.raises(CheckpointError, match="F8_E4M3 tensors, which an AIMv2 cannot compute in"):
        load(source)
    shutil.rmtree(tmp_path / "there")


# -------- bad input


def test_all_that_does_not_fit_comes_in_one_sorted_error(tmp_path):
    tensors = dict(model().state_dict())
    del tensors["trunk.blocks.1.norm_1.weight"], tensors["trunk.blocks.0.attn.qkv.weight"]
    tensors |= {"trunk.blocks.1.norm_9.weight": torch.ones(64), "extra": torch.ones(1)}
    tensors["trunk.blocks.2.mlp.fc2.weight"] = torch.ones(176, 64)
    source = write(tmp_path / "apple", tensors)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(source, tmp_path / "there", to="transformers")
    assert str(caught.value) == (
        f"{source}: the checkpoint does not fit an AIMv2 in the apple layout; "
        "2 missing: trunk.blocks.0.attn.qkv.weight, trunk.blocks.1.norm_1.weight; "
        "2 unmatched: extra, trunk.blocks.1.norm_9.weight; "
        "1 mis-shaped: trunk.blocks.2.mlp.fc2.weight [176, 64] where [64, 176] was expected"
    )
    assert not (tmp_path / "there").exists()


def test_a_key_in_two_shards_is_in_that_error_too(tmp_path):
    source = write(tmp_path / "apple", model().state_dict(), shards=2)
    first, second = sorted(source.glob("*.safetensors"))
    save_file(load_file(second) | {"trunk.post_trunk_norm.weight": torch.ones(64), "odd": torch.ones(1)}, second)
    save_file(load_file(first) | {"trunk.post_trunk_norm.weight": torch.ones(64)}, first)
    with pytest.raises(CheckpointError, match="1 unmatched: odd; 1 duplicate: trunk.post_trunk_norm.weight"):
        load(source)


def test_a_destination_that_exists_is_left_alone(tmp_path):
    source = write(tmp_path / "apple", model().state_dict())
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already; name a new directory"):
        convert_checkpoint(source, tmp_path / "there", to="timm")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    source = write(tmp_path / "apple", model().state_dict())
    monkeypatch.setattr("harness.models.aimv2.write_config", lambda *given: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(source, tmp_path / "there", to="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["apple"]


def test_a_missing_shard_is_named(tmp_path):
    source = write(tmp_path / "apple", model().state_dict(), shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 shards that .* names: model-00002-of-00003.safetensors"):
        load(source)


def test_an_index_cannot_lead_out_of_its_directory(tmp_path):
    source = write(tmp_path / "apple", model().state_dict(), shards=2)
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../model-00001-of-00002"))
    with pytest.raises(CheckpointError, match="names files outside its directory"):
        load(source)
    index.write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="not an index of shards"):
        load(source)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    source = write(tmp_path / "apple", model().state_dict(), shards=2)
    index = source / "model.safetensors.index.json"
    result = json.loads(index.read_text())
    moved = next(key for key, file in result["weight_map"].items() if "00001" in file)
    result["weight_map"][moved] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(result))
    with pytest.raises(CheckpointError, match=f"not in their shard: {moved}"):
        load(source)


def test_a_truncated_tensor_is_found_before_anything_is_read(tmp_path):
    source = write(tmp_path / "apple", model().state_dict())
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated: .* ends at byte .* and the file at"):
        convert_checkpoint(source, tmp_path / "there", to="timm")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": (b"", b"", None, "not a whole safetensors file"),
    "length beyond the file": (b"{}", b"", 1 << 40, "not a whole safetensors file"),
    "negative length": (b"{}", b"", (1 << 64) - 1, "not a whole safetensors file"),
    "no JSON": (b"hello!!!", b"", None, "header cannot be read"),
    "a list": (b"[1, 2]", b"", None, "it is not an object"),
    "deep JSON": (b"[" * 100_000, b"", None, "header cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "header cannot be read"),
    "twice the same key": (
        b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {}}',
        b"1",
        None,
        "1 duplicate: a",
    ),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, b"", None, "is not dtype, shape and data_offsets"),
    "an unknown dtype": ({"a": F32 | {"dtype": "F99"}}, b"\0" * 8, None, "which the format does not know"),
    "a dtype that is a list": ({"a": F32 | {"dtype": [1]}}, b"\0" * 8, None, "which the format does not know"),
    "a negative size": ({"a": F32 | {"shape": [-2]}}, b"\0" * 8, None, "which the format does not know"),
    "a shape of text": ({"a": F32 | {"shape": "22"}}, b"\0" * 8, None, "which the format does not know"),
    "bytes that do not fit the shape": (
        {"a": F32 | {"shape": [3]}},
        b"\0" * 8,
        None,
        "12 bytes, and its offsets span 8",
    ),
    "a shape beyond the file": (
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        b"\0" * 8,
        None,
        "is truncated",
    ),
    "an overlap": ({"a": F32, "b": F32}, b"\0" * 8, None, "a gap or an overlap"),
    "a gap": ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, b"\0" * 20, None, "a gap or an overlap"),
    "bytes left over": ({"a": F32}, b"\0" * 12, None, "4 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(tmp_path, name):
    header, data, length, words = HOSTILE[name]
    path = write_raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_pickle_is_never_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "model").mkdir()
    torch.save({"weights": Bomb()}, tmp_path / "model" / "pytorch_model.bin")
    shutil.copy(tmp_path / "model" / "pytorch_model.bin", tmp_path / "renamed.safetensors")
    for path, words in (
        (tmp_path / "model", "holds pickles only"),
        (tmp_path / "model" / "pytorch_model.bin", "is a pickle"),
        (tmp_path / "renamed.safetensors", "is a pickle"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load(path)
    assert not (tmp_path / "exploded").exists()


def test_a_digest_is_that_of_the_tensors_not_of_the_files(tmp_path):
    tensors = model().state_dict()
    whole, sharded = write(tmp_path / "whole", tensors), write(tmp_path / "sharded", tensors, shards=3)
    digest = checkpoint_digest(whole)
    assert len(digest) == 64 and checkpoint_digest(sharded) == checkpoint_digest(whole / "model.safetensors") == digest
    changed = dict(tensors) | {"trunk.post_trunk_norm.weight": tensors["trunk.post_trunk_norm.weight"] + 1e-6}
    assert checkpoint_digest(write(tmp_path / "changed", changed)) != digest


def test_layouts_are_told_by_keys():
    assert layout_of(["preprocessor.pos_embed", "trunk.blocks.0.norm_1.weight", "head.k.weight"]) == "apple"
    assert layout_of(["embeddings.patch_embed.weight", "rms_norm.weight"]) == "transformers"
    assert layout_of(["patch_embed.proj.weight", "norm.weight", "pos_embed"]) == "timm"
    with pytest.raises(CheckpointError, match="mixes layouts .1 of apple, 1 of timm among 2 keys"):
        layout_of(["trunk.x", "blocks.0.x"])
    with pytest.raises(CheckpointError, match="no AIMv2 checkpoint: its 2 keys .bert.a, bert.b"):
        layout_of(["bert.a", "bert.b"])
    with pytest.raises(CheckpointError, match="early version of the conversion script of transformers"):
        layout_of(["embeddings.patch_embed.weight", "encoder.layers.0.ffn.fc1.weight"])
