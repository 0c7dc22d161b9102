"""Any checkpoint is a case: recognised by its files, built by its library, given inputs that a seed draws."""

import json
import shutil
import warnings

import pytest
import torch
from torch import nn

from harness import Case, open_device, validate
from harness.checkpoints import material
from harness.checkpoints.building import case_arguments, parts_of, stored_dtypes
from harness.checkpoints.libraries import quiet_libraries
from harness.checkpoints.material import Asked
from harness.checkpoints.padding import NOTE
from harness.checkpoints.recognition import checkpoints_in, recognise
from harness.checkpoints.sentence_models import similarities
from harness.checkpoints.transformers_models import has_tokenizer
from harness.conformance.checkpoints import known
from harness.models.aimv2 import PHOTO
from harness.reference import Models
from harness.tests import checkpoints
from harness.tests.needs import emulated_device, import_transformers, lacks

MODELS = Models()  # one for all tests: the last model is kept


@pytest.fixture(scope="module")
def transformers():
    return import_transformers()


@pytest.fixture(scope="module")
def folder(transformers, tmp_path_factory):
    """Small checkpoints by the names of `python -m harness.conformance checkpoints`, made where they are asked for."""
    root = tmp_path_factory.mktemp("checkpoints")

    def made(name):
        if not (root / name).exists():
            known()[name](root / name)
        return root / name

    return made


def run(path, *, seed=42, device="cpu", **asked):
    return validate(Case.from_checkpoint(path, **asked), seed, open_device(device), models=MODELS)


def needs(library):
    return pytest.mark.skipif(lacks(library), reason=f"{library} is not installed")


# -------- recognised by its files


def marked(tmp_path, name, **fields):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(fields if fields else []))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("modules.json", {}, "sentence-transformers"),
        ("adapter_config.json", {"peft_type": "LORA"}, "PEFT"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "diffusers"),
        ("config.json", {"_class_name": "AutoencoderKL"}, "diffusers"),
        ("config.json", {"architecture": "vit_tiny_patch16_224"}, "timm"),
        ("config.json", {"architectures": ["BertModel"], "model_type": "bert"}, "transformers"),
        ("config.json", {"architectures": ["AIMv2Model"], "model_type": "aimv2"}, "AIMv2"),
        ("config.json", {"architectures": ["Aimv2VisionModel"], "model_type": "aimv2_vision_model"}, "AIMv2"),
        ("config.json", {"architecture": "aimv2_large_patch14_224"}, "AIMv2"),
    ],
)
def test_a_directory_is_recognised_by_its_files(tmp_path, name, fields, kind):
    assert recognise(marked(tmp_path, name, **fields)).kind == kind


def test_a_sentence_encoder_wins_over_the_config_beside_it(tmp_path):
    marked(tmp_path, "config.json", architectures=["BertModel"], model_type="bert")
    assert recognise(marked(tmp_path, "modules.json")).kind == "sentence-transformers"


def test_a_folder_of_folders_is_the_checkpoints_in_it(tmp_path):
    for name in ("b", "a"):
        marked(tmp_path / name, "config.json", architectures=["BertModel"], model_type="bert")
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("")
    assert checkpoints_in(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert checkpoints_in(tmp_path / "a") == [tmp_path / "a"]


# -------- transformers


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("bert", {"logits"}),
        ("beit", {"logits"}),
        ("wav2vec2", {"logits"}),
        ("clip", {"logits_per_image", "text_embeds", "image_embeds"}),
        ("t5", {"logits", "encoder_last_hidden_state"}),
    ],
)
def test_a_directory_runs_without_a_line_of_python(folder, name, outputs):
    verdict = run(folder(name))
    assert verdict.passed and outputs <= verdict.comparisons.keys()
    assert verdict.evidence.weights_from.startswith("loaded:")


def test_a_language_model_has_a_forward_a_step_from_its_cache_and_a_generation(folder):
    path = folder("llama")
    assert parts_of(path) == ("forward", "decode", "batch", "generate")
    result = {part: run(path, part=part) for part in parts_of(path)}
    assert all(item.passed for item in result.values())
    lone = result.pop("batch")
    assert {name: item.shape for name, item in lone.comparisons.items()} == dict.fromkeys(
        ("alone", "together"), (1, 32, 128)
    )
    assert any("batch invariance: a sample alone and in its batch" in note for note in lone.evidence.notes)
    shapes = {part: item.comparisons["logits"].shape for part, item in result.items()}
    assert shapes == {"forward": (2, 32, 128), "decode": (2, 1, 128), "generate": (2, 8, 128)}
    made = result["forward"].decisions
    assert made.perplexity == pytest.approx(made.expected_perplexity, rel=1e-3) and made.perplexity > 1
    assert result["generate"].comparisons["tokens"].shape == (2, 8)
    assert result["forward"].decisions.count == 64 and result["decode"].decisions.count == 2


def test_a_step_from_the_cache_gives_what_a_forward_gives(folder):
    """Without padding, where both count positions alike."""
    given = {"text": "The tokens of one text have no padding beside them."}
    outputs = {}
    for part in ("forward", "decode"):
        case = Case.from_checkpoint(folder("llama"), part=part, **given)
        inputs = case.inputs(torch.Generator().manual_seed(1))
        run_it = case.forward or (lambda model, inputs: model(**inputs))
        outputs[part] = run_it(case.model(torch.float32), inputs)["logits"][:, -1]
    assert torch.allclose(outputs["forward"], outputs["decode"], atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_row_on_the_emulated_device_passes(folder, name):
    emulated_device()
    assert run(folder(name), device="emulated").passed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_checkpoint_is_built_in_the_dtype_of_the_case(folder, dtype):
    verdict = run(folder("bert"), dtype=dtype)
    assert verdict.passed and verdict.comparison.dtype == dtype


def test_the_stored_dtype_is_read_from_the_weights(folder, transformers, tmp_path):
    assert stored_dtypes(folder("bert")) == ("float32",)
    transformers.BertModel.from_pretrained(folder("bert"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert stored_dtypes(tmp_path) == ("bfloat16",)


# -------- inputs


def drawn(path, seed=1, **asked):
    return Case.from_checkpoint(path, **asked).inputs(torch.Generator().manual_seed(seed))


def test_text_goes_through_the_checkpoints_own_tokenizer(folder):
    path = folder("bert")
    given = drawn(path, batch=3, length=20)
    assert given["input_ids"].shape == (3, 20)
    assert torch.equal(given["input_ids"], drawn(path, batch=3, length=20)["input_ids"])
    assert not torch.equal(given["input_ids"], drawn(path, seed=2, batch=3, length=20)["input_ids"])
    own = drawn(path, text="the age of wisdom")["input_ids"]
    from transformers import AutoTokenizer  # of that folder: what is trained again may number its tokens otherwise

    assert own[0].tolist() == AutoTokenizer.from_pretrained(path)("the age of wisdom")["input_ids"]


def test_lines_of_a_file_are_texts(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("one line\n\n另一行\n", encoding="utf-8")
    given = drawn(folder("bert"), text=str(tmp_path / "texts.txt"))
    assert given["input_ids"].shape[0] == 2 and given["attention_mask"].min() == 0  # the shorter one is padded


def test_ids_are_drawn_where_there_is_no_tokenizer_and_the_report_says_so(folder):
    case = Case.from_checkpoint(folder("roberta"))
    given = case.inputs(torch.Generator().manual_seed(1))
    assert case.notes == ("there is no tokenizer beside the weights: the token ids are drawn by seed", NOTE)
    assert given["input_ids"].min() > 2 and given["input_ids"].max() < 128
    assert given["attention_mask"].sum() == 2 * 32 - 8
    assert case.notes[0] in run(folder("roberta")).evidence.notes
    assert Case.from_checkpoint(folder("bert")).notes == (NOTE,)


@pytest.mark.parametrize(("name", "left"), [("llama", True), ("blip", True), ("bert", False), ("t5", False)])
def test_what_goes_on_where_a_text_ends_is_padded_on_the_left(folder, tmp_path, name, left):
    """BLIP describes a picture: it decodes though it is no CAUSAL_LM of transformers."""
    (tmp_path / "texts.txt").write_text("the\nthe best of times\n")
    texts = {"text": str(tmp_path / "texts.txt")} if has_tokenizer(folder(name)) else {}
    mask = Case.from_checkpoint(folder(name), **texts).inputs(torch.Generator().manual_seed(1))["attention_mask"]
    assert mask.min() == 0 and bool((mask[:, 0] == 0).any()) is left and bool((mask[:, -1] == 0).any()) is not left


def test_libraries_are_quiet_about_names_that_they_take_from_one_another():
    """A user can do nothing about them; what else is told is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("will be removed in v6", FutureWarning, stacklevel=1)
            warnings.warn("the weights are odd", UserWarning, stacklevel=1)
    assert [str(item.message) for item in told] == ["the weights are odd"]


def test_pictures_go_through_the_image_processor(folder, transformers):
    own = drawn(folder("deit"), image=str(PHOTO))["pixel_values"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder("deit"))
    expected = processor(material.pictures(Asked(image=str(PHOTO)), None), return_tensors="pt")["pixel_values"]
    assert torch.equal(own, expected)
    assert drawn(folder("deit"), batch=3)["pixel_values"].shape == (3, 3, 32, 32)
    assert "noise" in Case.from_checkpoint(folder("vit")).notes[0]


def test_texts_are_of_three_languages_in_turn():
    result = material.texts(Asked(batch=3), torch.Generator().manual_seed(0))
    for text, language in zip(result, material.TEXT_LANGUAGES):
        assert any(line in text for line in material.sentences(language))


def test_a_sound_is_a_second_of_a_voice():
    (sound,) = material.sounds(Asked(batch=1), torch.Generator().manual_seed(0), 16000)
    assert sound.shape == (16000,) and sound.dtype == torch.float32 and float(sound.abs().max()) == 0.5
    spectrum = torch.fft.rfft(sound.double()).abs().square()
    assert float(spectrum[80:2000].sum() / spectrum.sum()) > 0.9  # a hertz a bin: the pitch and its harmonics


def test_frames_move_over_a_picture():
    (clip,) = material.frames(Asked(batch=1), torch.Generator().manual_seed(0), 4)
    assert len(clip) == 4 and len({item.tobytes() for item in clip}) == 4


def test_drawn_ids_avoid_those_with_a_meaning():
    for vocabulary in (128, 50000):
        result = material.ids(Asked(batch=64), torch.Generator().manual_seed(0), vocabulary, 64, {0, 1, 2, 77})
        assert not torch.isin(result, torch.tensor([0, 1, 2, 77])).any()
        assert result.min() >= 3 and result.max() < vocabulary and result.unique().numel() > 100


# -------- other libraries and programs


@needs("sentence_transformers")
def test_a_sentence_encoder_gives_embeddings(folder):
    verdict = run(folder("sentences"))
    assert verdict.passed and verdict.comparisons["sentence_embedding"].shape == (2, 32)


@needs("sentence_transformers")
def test_a_sentence_encoder_retrieves_texts_among_others(folder):
    verdict = run(folder("sentences"), part="retrieval")
    assert verdict.passed and verdict.comparisons["similarity"].shape == (24, 23)
    assert verdict.decisions.count == verdict.decisions.agree == 24 and verdict.decisions.topk == 1
    assert parts_of(folder("sentences")) == ("forward", "retrieval")
    assert parts_of(folder("sentences"), Asked(text="one text of the user's own")) == ("forward",)


def test_the_similarity_of_a_text_to_itself_is_left_out():
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    result = similarities(lambda inputs: {"sentence_embedding": inputs["x"]}, {"x": vectors})["similarity"]
    for row in range(5):
        others = [column for column in range(5) if column != row]
        wanted = [torch.cosine_similarity(vectors[row], vectors[column], dim=0) for column in others]
        torch.testing.assert_close(result[row], torch.stack(wanted))


@needs("peft")
def test_an_adapter_runs_on_the_base_beside_it(folder):
    adapter, base = folder("adapter"), folder("llama")
    verdict = run(adapter)
    assert verdict.passed and parts_of(adapter) == parts_of(base)
    outputs = [Case.from_checkpoint(path).model(torch.float32) for path in (adapter, base)]
    given = drawn(base)
    assert not torch.allclose(*(model(**given)["logits"] for model in outputs))


@needs("diffusers")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["diffusers-SD3Transformer2DModel", "diffusers-UNet2DModel", "diffusers-DiTTransformer2DModel"]
)
def test_a_component_of_diffusers_is_built_in_the_dtype_that_is_asked_for(folder, name, dtype):
    emulated_device()
    model = case_arguments(folder(name))["model"](dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@needs("diffusers")
def test_a_component_of_diffusers_runs(folder):
    emulated_device()  # which diffusers sees: its GEGLU is then torch_npu's, which no CPU has
    verdict = run(folder("diffusers-UNet2DConditionModel"), device="emulated")
    assert verdict.passed and verdict.comparisons["sample"].shape == (2, 4, 16, 16)


@pytest.mark.parametrize("layout", ["apple", "transformers", "timm"])
def test_aimv2_runs_in_each_of_its_layouts(tmp_path, layout):
    from harness.models.aimv2 import convert_checkpoint

    model = checkpoints.model()
    named = dict(model_type="aimv2", architectures=["AIMv2Model"])
    source = checkpoints.write(tmp_path / "source", model.state_dict(), **named)
    convert_checkpoint(source, tmp_path / layout, to=layout)
    assert recognise(tmp_path / layout).kind == "AIMv2"
    assert run(tmp_path / layout).passed


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(50, 16), nn.Linear(16, 4)

    def forward(self, ids, scale):
        return self.last(self.embedding(ids)) * scale


def test_an_exported_program_is_given_inputs_like_its_examples(tmp_path):
    examples = (torch.arange(14).reshape(2, 7), torch.rand(2, 7, 1))
    torch.export.save(torch.export.export(Scaled().eval(), examples), tmp_path / "scaled.pt2")
    case = Case.from_checkpoint(tmp_path / "scaled.pt2")
    ids, scale = case.inputs(torch.Generator().manual_seed(1))["args"]
    assert ids.shape == (2, 7) and 0 <= ids.min() and ids.max() <= 13 and scale.shape == (2, 7, 1)
    assert run(tmp_path / "scaled.pt2").passed


def test_a_scripted_program_is_given_the_examples_beside_it_or_a_picture(tmp_path):
    from safetensors.torch import save_file

    torch.jit.script(Scaled().eval()).save(str(tmp_path / "scaled.pt"))
    examples = {"ids": torch.arange(14).reshape(2, 7), "scale": torch.rand(2, 7, 1)}
    save_file(examples, tmp_path / "scaled.inputs.safetensors")
    assert run(tmp_path / "scaled.pt").passed
    patches = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)).eval()
    torch.jit.trace(patches, torch.rand(1, 3, 224, 224)).save(str(tmp_path / "patches.pt"))
    assert run(tmp_path / "patches.pt").passed
    assert "noise" in Case.from_checkpoint(tmp_path / "patches.pt").notes[0]


def test_a_function_gives_a_case_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\nfrom harness import Case\n"
        "def small():\n"
        "    return Case(name='x', model=lambda: torch.nn.Linear(4, 2), "
        "inputs=lambda generator: torch.randn(3, 4, generator=generator))\n"
    )
    monkeypatch.chdir(tmp_path)
    case = Case.from_checkpoint("my_models:small", dtype="float16")
    assert (case.name, case.dtype) == ("my_models.small", "float16")
    assert validate(case, 1, open_device("cpu")).passed


def test_rows_of_one_checkpoint_share_the_build(folder):
    one, two = (Case.from_checkpoint(folder("bert"), length=length) for length in (32, 32))
    assert one.key == two.key
    shutil.copytree(folder("bert"), folder("bert").parent / "copy")
    assert Case.from_checkpoint(folder("bert").parent / "copy").key != one.key
