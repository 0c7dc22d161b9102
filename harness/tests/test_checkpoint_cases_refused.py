"""Bad checkpoints are refused in one sentence: what was found, what was expected, what to do."""

import importlib.util
import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import Case, open_device, validate
from harness.checkpoints.building import case_arguments, parts_of
from harness.checkpoints.recognition import checkpoints_in, recognise
from harness.conformance.checkpoints import known
from harness.errors import CheckpointError, HarnessError
from harness.models.aimv2 import PHOTO
from harness.reference import Models
from harness.tests.needs import import_transformers


@pytest.fixture(scope="module")
def transformers():
    return import_transformers()


@pytest.fixture(scope="module")
def sound(transformers, tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    for name in ("llama", "bert", "deit"):
        known()[name](root / name)
    return root


@pytest.fixture
def copy(sound, tmp_path):
    def copied(name="llama", **fields):
        shutil.copytree(sound / name, tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        return tmp_path / name

    return copied


def refused(path, **asked):
    """What is said of a checkpoint, on one line."""
    with pytest.raises(HarnessError) as raised:
        validate(Case.from_checkpoint(path, **asked), 1, open_device("cpu"), models=Models())
    text = str(raised.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_an_absent_directory(tmp_path):
    assert f"no checkpoint at {tmp_path / 'absent'}; give a directory with a config.json" in refused(
        tmp_path / "absent"
    )


def test_a_directory_without_a_checkpoint(tmp_path):
    assert "holds no checkpoint; one of modules.json" in refused(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint, and neither do its folders"):
        checkpoints_in(tmp_path)


def test_a_config_without_weights(copy):
    path = copy()
    (path / "model.safetensors").unlink()
    assert refused(path) == f"{path} holds a config and no weights; copy its .safetensors files too"


def test_absent_shards(copy):
    path = copy()
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "lacks 1 of 2 shards that model.safetensors.index.json names: model-00002-of-00002" in refused(path)


def test_a_file_that_is_cut_off(copy):
    path = copy()
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)
    assert "model.safetensors is truncated" in refused(path)


def changed(path, change):
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors), path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_layer_that_is_missing_is_not_drawn_at_random(copy, capfd):
    path = changed(
        copy(), lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    )
    assert "lacks 9 weights of the model that its config describes: model.layers.1." in refused(path)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_a_head_that_the_checkpoint_never_had_is_drawn_and_the_report_says_so(copy):
    path = changed(
        copy("bert"), lambda tensors: {name: tensor for name, tensor in tensors.items() if "cls." not in name}
    )
    verdict = validate(Case.from_checkpoint(path), 1, open_device("cpu"), models=Models())
    assert verdict.passed and verdict.evidence.weights_from.startswith("partly:")


def test_a_weight_of_another_shape(copy):
    def cut(tensors):
        name = next(tensor for tensor in tensors if "layers.0.self_attn.q_proj" in tensor)
        return tensors | {name: tensors[name][:-1].clone()}

    text = refused(changed(copy(), cut))
    assert (
        "1 weights have other shapes than its config says: model.layers.0.self_attn.q_proj.weight is [63, 64]" in text
    )
    assert "where [64, 64] was expected" in text


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "it ran"))
    yield
    assert not (tmp_path / "it ran").exists()


def test_a_pickle_is_never_read(copy, evil):
    path = copy()
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert "holds pickles only (pytorch_model.bin), which are never read; save the model as safetensors" in refused(
        path
    )


def test_a_file_of_torch_save_is_no_program(tmp_path, evil):
    torch.save(Evil(), tmp_path / "model.pt")
    assert "is a pickle, which can run any program and is never read" in refused(tmp_path / "model.pt")


def test_a_pickle_inside_of_an_exported_program_is_not_read(tmp_path, evil):
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), (torch.rand(3, 4),))
    torch.export.save(program, tmp_path / "sound.pt2")
    places = 0
    with zipfile.ZipFile(tmp_path / "sound.pt2") as sound, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as planted:
        for name in sound.namelist():
            data = sound.read(name)
            inner = tmp_path / "inner.pt"
            if "sample_inputs" in name or "example_inputs" in name:
                places += 1
                torch.save((Evil(),), inner)
                data = inner.read_bytes()
            planted.writestr(name, data)
    assert places and recognise(tmp_path / "evil.pt2").kind == "torch.export"
    assert "evil.pt2" in refused(tmp_path / "evil.pt2")


REMOTE = dict(model_type="mine", architectures=["MineForCausalLM"])
CODE = dict(AutoConfig="configuration_mine.MineConfig", AutoModelForCausalLM="modeling_mine.MineForCausalLM")


def test_code_in_a_checkpoint_needs_permission(copy, evil):
    path = copy(auto_map=CODE, **REMOTE)
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (path / name).write_text("import os\nos.mkdir(os.environ['EVIL'])\n")
    text = refused(path)
    assert (
        "computed by code of its own (configuration_mine.py, modeling_mine.py), which runs only with permission" in text
    )
    assert "--precision-trust-remote-code" in text


def test_code_in_a_checkpoint_runs_with_permission(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = copy(auto_map=CODE, **REMOTE)
    (path / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (path / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    case = Case.from_checkpoint(path, trust_remote_code=True)
    assert validate(case, 1, open_device("cpu"), models=Models()).passed


def test_a_model_that_the_library_lacks(copy, tmp_path):
    assert "holds a LlamaForTelepathy, which transformers" in refused(copy(architectures=["LlamaForTelepathy"]))
    text = refused(copy("bert", model_type="bert9", architectures=["Bert9"]))
    assert "holds a model of the type 'bert9', which transformers" in text and "install the version that has it" in text


def test_a_library_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    text = refused(tmp_path)
    assert text.startswith(
        "this is a checkpoint of timm, and timm is not installed; pip install 'npu-accuracy-harness["
    )


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision(copy):
    path = copy("deit")
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "DINOv3ViTImageProcessor"}))
    text = refused(path)
    assert text == (
        f"the image processor of {path} needs torchvision, which is not installed here or does not fit this torch; "
        "install the one that fits"
    )


def test_a_text_for_a_model_of_pictures_and_a_picture_for_one_of_texts(sound):
    text = refused(sound / "deit", text="a text")
    assert "takes pixel_values and no text: leave --precision-text out; it takes --precision-image" in text
    assert "takes input_ids and no image: leave --precision-image out" in refused(sound / "bert", image=str(PHOTO))


def test_pictures_among_tokens_need_the_processor_that_puts_them_there(transformers, tmp_path):
    config = transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"], image_token_id=5)
    config.save_pretrained(tmp_path)
    assert f"takes pictures among its tokens, and {tmp_path} has no processor that puts them there" in refused(tmp_path)


def test_an_input_that_nobody_can_draw(transformers, tmp_path):
    config = transformers.PatchTSTConfig(architectures=["PatchTSTForPrediction"])
    config.save_pretrained(tmp_path)
    text = refused(tmp_path)
    assert text.startswith("PatchTSTForPrediction takes past_values, which cannot be drawn here; write a function")


def test_files_that_are_not_what_they_should_be(sound, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "holds no text; one text a line was expected" in refused(sound / "bert", text=str(tmp_path / "empty.txt"))
    assert "no picture at" in refused(sound / "deit", image=str(tmp_path / "absent.jpg"))


def test_a_tokenizer_of_another_model(copy):
    path = copy("bert")
    small = changed(path, lambda tensors: tensors)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    assert "and the model has 20: they do not belong together" in refused(small)


def test_a_config_that_is_broken_or_names_nothing(copy):
    path = copy()
    (path / "config.json").write_text("{")
    assert "config.json cannot be read as JSON" in refused(path)
    (path / "config.json").write_text("[]")
    assert "holds a JSON list where an object was expected" in refused(path)
    (path / "config.json").write_text("{}")
    assert "names no model: it has none of architectures" in refused(path)


def test_an_adapter_without_its_base(tmp_path):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/llama"}))
    text = refused(path)
    assert text == (
        f"{path} is an adapter of someone/llama, which is not here; put the base model's directory beside it as "
        f"{tmp_path / 'llama'}"
    )


def test_a_part_that_is_not_there(sound):
    assert parts_of(sound / "bert") == ("forward",)
    with pytest.raises(CheckpointError, match="has no part 'decode'; it has forward"):
        case_arguments(sound / "bert", part="decode")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "no module no_such_module is here"),
        ("json:absent", "the module json has no absent"),
        ("os:getcwd", "returned a str where a harness.Case was expected"),
    ],
)
def test_a_function_that_gives_no_case(name, words):
    assert words in refused(name)


@pytest.mark.parametrize("asked", [{"batch": 0}, {"length": 0}])
def test_a_size_that_cannot_be(sound, asked):
    with pytest.raises(ValueError, match="at least 1 was expected"):
        Case.from_checkpoint(sound / "bert", **asked)
