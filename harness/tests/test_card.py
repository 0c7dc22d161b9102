"""`python -m harness card`: the folder that is published for a checkpoint."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from harness import HarnessError
from harness.card import facts, making, percent, performance, readme, rendering
from harness.card.making import Order, make
from harness.checkpoints.recognition import recognise
from harness.checkpoints.sentence_models import RETRIEVAL
from harness.checkpoints.transformers_models import BATCH, DECODE, GENERATE
from harness.commands.main import main
from harness.devices import Device
from harness.errors import CheckpointError
from harness.judging.verdict import Decisions, SwitchCost
from harness.languages import words_of
from harness.models.aimv2 import convert_checkpoint, load, preprocess
from harness.report import Row
from harness.report import load as load_report
from harness.report.rows import Numbers
from harness.run.timing import P90_NEEDS, measure
from harness.tests.checkpoints import model, write
from harness.tests.needs import import_transformers, skip_without_torch_npu

WORDS = words_of("card")
FRONT = """---
license: other
license_name: apple-amlr
pipeline_tag: image-feature-extraction
language: [en, zh]
base_model: apple/aimv2
---
# A model

@misc{some2024,
  title = {A title},
}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small AIMv2 in the layout of transformers, with a README."""
    folder = tmp_path_factory.mktemp("checkpoints")
    apple = write(folder / "apple", dict(model().state_dict()))
    convert_checkpoint(apple, folder / "aimv2-small", to="transformers")
    (folder / "aimv2-small" / "README.md").write_text(FRONT, encoding="utf-8")
    return folder / "aimv2-small"


@pytest.fixture(scope="module")
def card(checkpoint, tmp_path_factory):
    """Its card in Chinese, on the emulated device."""
    skip_without_torch_npu()
    folder = tmp_path_factory.mktemp("card") / "out"
    how = dict(device="emulated", dtypes=("float32", "float16"), seeds=(42, 123), lang="zh")
    return make(Order(path=str(checkpoint), output=folder, **how))


def stored_in(made):
    """What results/card.json and results/precision.json hold: the card and its rows."""
    stored = json.loads((made.folder / "results" / "card.json").read_text(encoding="utf-8"))
    return stored, load_report(made.folder / "results" / "precision.json").rows


def text_of(made):
    return (made.folder / "README.md").read_text(encoding="utf-8")


def script(folder, name, *arguments):
    """A script of a card in a process of its own, on the CPU, where the harness is not found."""
    code = "import sys, runpy; sys.modules['harness'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, ''); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {"PATH": "/usr/bin:/bin", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run(
        [sys.executable, "-c", code, name, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


# -------- the folder


def test_the_folder_holds_what_the_origin_card_holds(card):
    assert card.bad == [] and card.missing == () and len(card.rows) == 4
    names = {str(path.relative_to(card.folder)) for path in card.folder.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "inference.py",
        "convert_weights.py",
        "modeling_aimv2_distilled.py",
        "configuration_aimv2_distilled.py",
        "requirements.txt",
        "results/precision.json",
        "results/precision.md",
        "results/card.json",
        "logs/inference.log",
    }
    assert all(f"| {name} |" in text_of(card) for name in names)  # the table of files is whole


def test_the_readme_has_every_section_and_no_blank_field(card):
    text = text_of(card)
    sections = re.findall(r"^## (\d+)\. (.+)$", text, re.MULTILINE)
    assert [number for number, _ in sections] == [str(number) for number in range(1, 14)]
    assert [title for _, title in sections] == [
        WORDS["zh"][name]
        for name in (
            "introduction environment notes weights usage evidence accuracy performance memory files regenerate limits "
            "citation"
        ).split()
    ]
    assert not re.search(r"\|\s*\|\s*$", text, re.MULTILINE) and "None" not in text and "{" not in text.split("```")[0]
    assert re.search(r"\| 42 \| \d\.\d\de-\d\d \| \d\.\d\de-\d\d \| [01]\.\d{9} \| ✅ PASS \|", text)
    assert max(row.cos_sim for row in card.rows) <= 1


def test_an_emulated_card_says_so_in_the_front_matter_and_in_the_first_line_below(card):
    _, front, rest = text_of(card).split("---", 2)
    fields = yaml.safe_load(front)
    assert fields["tags"] == ["NPU", "Ascend", "ascend-npu", "emulated"] and fields["library_name"] == "pytorch"
    assert (fields["license"], fields["pipeline_tag"], fields["base_model"]) == (
        "apple-amlr",
        "image-feature-extraction",
        "apple/aimv2",
    )
    assert rest.strip().splitlines()[0].startswith("**EMULATED（模拟）")


def test_no_emulated_time_is_on_the_card(card):
    assert " ms" not in text_of(card) and WORDS["zh"]["times_emulated"] in text_of(card)
    assert WORDS["zh"]["memory_emulated"] in text_of(card).split("## 9.")[1].split("## 10.")[0]
    assert f"| {WORDS['zh']['no_decisions']} | – |" in text_of(card)  # AIMv2 gives features
    assert "forward" not in (card.folder / "logs" / "inference.log").read_text(encoding="utf-8")
    stored = load_report(card.folder / "results" / "precision.json")
    assert stored.performance == ()


def test_no_folder_of_this_machine_is_published(card, checkpoint):
    for path in card.folder.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert str(checkpoint.parent) not in text and str(card.folder) not in text, path


def test_the_tables_regenerate_from_the_stored_numbers(card):
    stored, rows = stored_in(card)
    assert readme.readme(stored, rows, "zh", "origin") == text_of(card)
    assert len(rows) == len(card.rows) and "rows" not in stored["accuracy"]  # they are in precision.json alone


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("style", rendering.STYLES)
def test_every_template_is_whole_in_both_languages(card, style, lang):
    text = readme.readme(*stored_in(card), lang, style)
    own = WORDS[lang]
    headings = "\n".join(re.findall(r"^##? .+$", text, re.MULTILINE))
    for name in ("usage", "accuracy", "performance", "regenerate", "environment", "evidence"):
        assert own[name] in headings
    assert own["emulated"].format(device="Ascend910B4") in text and "None" not in text
    if lang == "en":
        assert not re.search(r"[\u4e00-\u9fff]", text)


def test_the_meanings_of_one_percent_are_named_in_english_as_in_the_table():
    assert {key: item.name for key, item in percent.MEANINGS.items()} == {
        key: WORDS["en"][f"meaning_{key}"] for key in percent.MEANINGS
    }


# -------- the scripts


@pytest.mark.parametrize("layout", ["apple", "transformers", "timm"])
def test_the_scripts_compute_what_the_model_here_computes(card, checkpoint, layout, tmp_path):
    source = checkpoint
    if layout != "transformers":
        source = tmp_path / layout
        convert_checkpoint(checkpoint, source, to=layout)
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "picture.png")
    done = script(
        card.folder, "inference.py", "--model-dir", source, "--device", "cpu", "--image", tmp_path / "picture.png",
        "--output", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load(source, dtype=torch.float32)(preprocess(tmp_path / "picture.png", size=56))
    assert torch.equal(load_file(tmp_path / "out.safetensors")["output"], expected)


def test_weights_are_converted_bit_for_bit_and_wrong_keys_are_refused(card, checkpoint, tmp_path):
    done = script(card.folder, "convert_weights.py", checkpoint, tmp_path / "converted")
    assert done.returncode == 0, done.stderr
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    expected = load(checkpoint, dtype=torch.float32).state_dict()
    assert converted.keys() == expected.keys() and all(
        torch.equal(converted[name], expected[name]) for name in expected
    )
    strange = write(tmp_path / "strange", {**load_file(checkpoint / "model.safetensors"), "more.weight": torch.ones(1)})
    refused = script(card.folder, "convert_weights.py", strange, tmp_path / "other")
    assert refused.returncode == 1 and "the key more.weight belongs to no AIMv2" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_inference_without_weights_ends_with_one_sentence(card, tmp_path):
    done = script(card.folder, "inference.py", "--device", "cpu", "--model-dir", tmp_path / "absent")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "there is no checkpoint at" in done.stderr


def test_a_script_that_does_not_run_is_not_offered(checkpoint, tmp_path, monkeypatch):
    skip_without_torch_npu()
    monkeypatch.setattr(making.scripts, "rendered", lambda name, values: "raise ValueError('broken')\n")
    made = make(
        Order(path=str(checkpoint), output=tmp_path / "out", device="emulated", dtypes=("float32",), seeds=(1,))
    )
    assert made.missing == ("inference.py does not run: ValueError: broken",)
    assert not (made.folder / "inference.py").exists() and not (made.folder / "convert_weights.py").exists()
    assert WORDS["en"]["script_failed"] in text_of(made)


def test_a_script_that_imports_the_harness_is_not_offered(checkpoint, tmp_path, monkeypatch):
    skip_without_torch_npu()
    monkeypatch.setattr(making.scripts, "rendered", lambda name, values: "import harness.report\n")
    made = make(
        Order(path=str(checkpoint), output=tmp_path / "out", device="emulated", dtypes=("float32",), seeds=(1,))
    )
    assert made.missing == ("inference.py does not run: ImportError: this script must do without harness.report",)


# -------- one percent


def row(**numbers):
    given = dict(test="t", case="c", dtype="float32", seed=1, shape=(2, 8), rel_l2=0.009, wape=0.02, mean_rel=0.5)
    given |= dict(cos_distance=4e-5, max_rel=3.0, cos_sim=1 - 4e-5)
    return Row(**given | numbers)


def test_every_meaning_of_one_percent_is_of_the_worst_seed():
    meanings = {item.key: item for item in percent.relative_errors([row(), row(rel_l2=0.011, wape=0.005)])}
    assert list(meanings) == ["rel_l2", "wape", "mape", "cosine", "max_rel", "score"]
    assert (meanings["rel_l2"].value, meanings["wape"].value, meanings["max_rel"].value) == (0.011, 0.02, 3.0)
    assert meanings["score"].value is None and meanings["score"].within is None
    assert meanings["cosine"].laxest and not meanings["rel_l2"].laxest
    assert meanings["rel_l2"].asked and not meanings["cosine"].asked


@pytest.mark.parametrize(("value", "within"), [(0.00999, True), (0.01, False), (0.01001, False), (math.nan, False)])
def test_one_percent_ends_at_one_percent(value, within):
    assert percent.relative_errors([row(rel_l2=value), row(rel_l2=0.0)])[0].within is within


def test_a_cosine_over_one_number_is_no_meaning():
    alone = row(shape=(1, 1))
    assert percent.MEANINGS["cosine"].of(alone) is None and percent.MEANINGS["cosine"].of(row()) == 4e-5
    assert readme._line(alone, WORDS["en"])[3] == "not meaningful: one number"
    assert readme._line(row(shape=(1, 2)), WORDS["en"])[3] == "0.999960000"


def test_decisions_and_the_batch_are_told_below_the_rows():
    """The worst row's; one sentence each."""
    card = {"device": "Ascend910B4"}
    fine = Decisions(count=10, agree=10, k=5, topk=1.0, kl=1e-9, perplexity=90.0, expected_perplexity=90.0)
    worse = Decisions(count=10, agree=9, k=5, topk=0.98, kl=2e-3, perplexity=90.25, expected_perplexity=90.0)
    assert readme._decided(card, [row(decisions=fine), row(decisions=worse), row()], WORDS["en"]) == [
        "Worst decisions: top-1 agreement 90.00%, top-5 agreement 98.00%, KL divergence 2.00e-03 nats.",
        "Perplexity: Ascend910B4 90.25, CPU 90.",
    ]
    assert readme._decided(card, [row()], WORDS["en"]) == []
    note = "batch invariance: a sample alone and in its batch have the same bits on the device and on the CPU"
    assert readme._invariance([row(notes=("another", note))], WORDS["en"]) == [note]
    assert "批次不变性" in readme._invariance([row(notes=(note,))], WORDS["zh"])[0]


def test_the_output_that_stands_for_a_row_is_named():
    numbers = {"text_embeds": Numbers(), "image_embeds": Numbers()}
    several = row(output="text_embeds", outputs=numbers)
    (said,) = readme._outputs([several, row(output="image_embeds", outputs=numbers)], WORDS["en"])
    assert said.startswith("Of 2 outputs each row shows the one that is furthest off, here text_embeds, image_embeds;")
    assert readme._outputs([row(output="output")], WORDS["en"]) == []


def test_a_part_of_a_checkpoint_is_explained():
    assert readme._title("gpt2", "float32", "forward", WORDS["en"]) == "gpt2, float32"
    assert readme._title("gpt2-decode", "float32", "decode", WORDS["en"]).startswith("gpt2-decode, float32: the last")
    known = {name.removeprefix("part_") for name in WORDS["en"] if name.startswith("part_")}
    assert known == {DECODE, BATCH, GENERATE, RETRIEVAL}


@pytest.mark.parametrize(("forecast", "priced"), [(2.0e-7, True), (2.01e-7, False)])
def test_a_card_without_a_table_of_switches_says_why(forecast, priced):
    one = row(forecast_golden_rel_l2=forecast, cpu_golden_rel_l2=1e-7)
    assert readme._no_switches([one], WORDS["en"]) == (WORDS["en"]["nothing_priced"] if priced else "")
    unfelt = SwitchCost(switch="exact GELU", before=1e-3, after=1e-3, remedy="do it")
    felt_none = readme._no_switches([one, row(switches=(unfelt,))], WORDS["en"])
    assert felt_none == WORDS["en"]["nothing_felt"]
    assert readme._no_switches([row()], WORDS["en"]) == ""


def test_rows_that_were_not_run_do_not_pass():
    ran, left_out = row(), row(criteria=("skip",), reasons=("Ascend310P3 has no bfloat16",), rel_l2=None)
    assert readme._conclusion([ran, ran], WORDS["en"]) == "Conclusion: all rows pass (2)."
    said = readme._conclusion([ran, left_out], WORDS["en"])
    assert said == "Conclusion: 1 of 2 rows pass. Not run: 1, for the reason given below."
    assert readme._conclusion([], WORDS["en"]) == "Conclusion: 0 of 0 rows pass."


@pytest.mark.parametrize(
    ("share", "text"), [(0.00667e-2, "0.00667 %"), (59.0, "5,900 %"), (None, "–"), ("nan", "nan"), (0.0, "0 %")]
)
def test_percent_is_written_in_full(share, text):
    assert readme._percent(share) == text


# -------- facts


def test_facts_of_a_readme_and_of_none(checkpoint, tmp_path):
    front, text = facts.readme_of(checkpoint)
    assert facts.licence_of(checkpoint, front) == "apple-amlr" and front["language"] == ["en", "zh"]
    assert facts.citation_of(text) == "@misc{some2024,\n  title = {A title},\n}"
    assert facts.readme_of(tmp_path) == ({}, "") and facts.licence_of(tmp_path, {}) is None
    (tmp_path / "LICENSE").touch()
    assert facts.licence_of(tmp_path, {}) == "LICENSE"
    (tmp_path / "README.md").write_text("---\n: [\n---\ntext", encoding="utf-8")
    assert facts.readme_of(tmp_path) == ({}, "text")


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("BertForMaskedLM", "fill-mask"),
        ("LlamaForCausalLM", "text-generation"),
        ("ViTForImageClassification", "image-classification"),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("BertModel", "feature-extraction"),
        ("ViTModel", "image-feature-extraction"),
    ],
)
def test_tasks_are_those_of_the_class(kind, task, tmp_path):
    transformers = import_transformers()
    cls = getattr(transformers, kind)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [kind], "model_type": "bert"}))
    assert facts.task_of(recognise(tmp_path), cls, cls.main_input_name, {}) == task
    assert facts.task_of(recognise(tmp_path), cls, cls.main_input_name, {"pipeline_tag": "other"}) == "other"


def test_what_is_not_known_says_why():
    unknown = {"value": None, "why": "licence_unknown"}
    assert readme.shown_fact(unknown, WORDS["en"]) == f"not given: {WORDS['en']['licence_unknown']}"
    assert readme.shown_fact({"value": ["en", "zh"], "why": ""}, WORDS["en"]) == "en, zh"
    assert all(
        key in WORDS["en"] for key in re.findall(r'"(\w+_(?:unknown|emulated|cpu))"', open(facts.__file__).read())
    )


# -------- speed


class Hardware:
    """What `performance` asks of a device of hardware."""

    hardware = True

    @staticmethod
    def memory():
        return None


def test_times_are_given_on_hardware_alone(monkeypatch, checkpoint):
    on_cpu = Device(name="cpu", backend="cpu", torch_device=torch.device("cpu"), reason="")
    how = dict(dtype="float32", batches=(1, 2), iterations=2, warmup=1)
    assert performance.forwards(checkpoint, on_cpu, **how).why == "times_cpu"
    monkeypatch.setattr(Device, "kind", property(lambda self: Hardware))
    rows = performance.forwards(checkpoint, on_cpu, **how).value
    assert [entry["batch_size"] for entry in rows] == [1, 2]
    for entry in rows:
        assert entry["throughput"] == pytest.approx(entry["batch_size"] * 1e3 / entry["avg_ms"])
        assert entry["min_ms"] <= entry["p50_ms"] <= entry["max_ms"] and entry["first_ms"] > 0


def test_percentiles_need_enough_forwards():
    clock = iter(range(10_000))
    few = measure(lambda: None, lambda: None, iterations=P90_NEEDS - 1, warmup=0, clock=lambda: next(clock))
    enough = measure(lambda: None, lambda: None, iterations=P90_NEEDS, warmup=1, clock=lambda: next(clock))
    assert few.p90_ms is None and few.first_ms is None
    assert enough.p90_ms == 1000 and enough.first_ms == 1000 and (enough.min_ms, enough.max_ms) == (1000, 1000)


# -------- what is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name a checkpoint"),
        (["absent"], "no checkpoint at absent"),
        (["CHECKPOINT", "--template", "none"], "--template none is neither one of origin, hub, vllm-ascend nor a file"),
        (["CHECKPOINT", "--within", "1"], "a limit of 1.0 is no share between 0 and 1"),
        (["CHECKPOINT", "--text", "hello"], "takes pictures: leave --text and --audio out"),
        (["HALF"], "holds a config and no weights; copy its .safetensors files too"),
        (["CHECKPOINT", "--device", "cuda:7"], "cuda:7 was asked for"),
    ],
)
def test_bad_input_is_told_in_one_sentence_and_leaves_nothing(checkpoint, tmp_path, capsys, arguments, text):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((checkpoint / "config.json").read_text())
    named = {"CHECKPOINT": str(checkpoint), "HALF": str(half)}
    arguments = [named.get(item, item) for item in arguments]
    assert main(["card", *arguments, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == [half]


@pytest.mark.parametrize("more", [{}, {"text": "hello"}], ids=["half a checkpoint", "a text"])
def test_what_cannot_run_is_refused_before_a_device_is_opened(checkpoint, tmp_path, monkeypatch, more):
    opened = []
    monkeypatch.setattr(making, "open_device", lambda *given, **how: opened.append(given))
    path = checkpoint
    if not more:
        path = tmp_path / "half"
        path.mkdir()
        (path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError):
        make(Order(path=str(path), output=tmp_path / "out", asked=more))
    assert opened == [] and not (tmp_path / "out").exists()


def test_the_command_that_makes_a_card_again_holds_all_that_was_asked_for(tmp_path):
    picture = tmp_path / "a picture.png"
    picture.touch()
    order = Order(
        path="/models/bert",
        output=tmp_path,
        limit=0.001,
        batches=(2, 8),
        iterations=20,
        warmup=1,
        asked=dict(length=64, trust_remote_code=True, text="two words", image=str(picture), audio=None),
    )
    assert order.command == (
        "python -m harness card bert --lang en --within 0.001 --batch-size 2 8 --iters 20 --warmup 1 --length 64 "
        "--trust-remote-code --text 'two words' --image 'a picture.png' --output OUT"
    )
    assert Order(path="bert", output=tmp_path).command == "python -m harness card bert --lang en --output OUT"


def test_an_output_that_is_there_is_left_alone(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["card", str(checkpoint), "--output", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err and (tmp_path / "mine.txt").read_text() == "mine"


def test_a_template_of_ones_own(card, tmp_path):
    stored, rows = stored_in(card)
    own = tmp_path / "team.md.j2"
    own.write_text(
        "{{ front_matter }}\n# {{ card.name }}: {{ card.parameters }}, {{ card.accuracy.rows[0].seed }}\n",
        encoding="utf-8",
    )
    assert readme.readme(stored, rows, "en", str(own)).endswith(f"# aimv2-small: {stored['parameters']}, 42\n")
    own.write_text("{{ card.absent.more }}", encoding="utf-8")
    with pytest.raises(HarnessError, match=r"the template team\.md\.j2 cannot be rendered"):
        readme.readme(stored, rows, "en", str(own))
    own.write_text("{% if %}", encoding="utf-8")
    with pytest.raises(HarnessError, match=r"the template team\.md\.j2, line 1, is not one"):
        rendering.compiled(str(own))


def test_without_the_extra_it_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(HarnessError, match=r"a card needs jinja2, .*pip install 'npu-accuracy-harness\[card\]'"):
        make(Order(path=str(checkpoint), output=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# -------- rows that fail


def test_a_failing_row_is_on_the_card_and_ends_the_command_with_1(checkpoint, tmp_path, capsys):
    skip_without_torch_npu()
    from harness import emulator

    arguments = ["card", str(checkpoint), "--device", "emulated", "--dtype", "float32", "--seeds", "1"]
    with emulator.fault("aclnnSilu", kind="scale", by=1.01):
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert "FAIL aimv2-small float32 seed 1: forecast_ratio" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "❌ FAIL" in text and "Conclusion: 0 of 1 rows pass." in text and "harness locate aimv2-small" in text


# -------- what names may hold


def test_no_name_is_markup_or_code(checkpoint, tmp_path):
    import shutil

    skip_without_torch_npu()
    folder = tmp_path / 'a"""; raise SystemExit("ran") #`<b>'
    shutil.copytree(checkpoint, folder)
    (folder / "README.md").write_text(
        "---\nlicense: <script>x</script>|y\nlanguage: [en]\n---\n@misc{a,\n```\n<b>\n}\n", encoding="utf-8"
    )
    made = make(Order(path=str(folder), output=tmp_path / "out", device="emulated", dtypes=("float32",), seeds=(1,)))
    text = text_of(made)
    assert made.missing == () and "<script>" not in text.split("---", 2)[2] and "\n<b>\n" not in text.split("```")[0]
    assert text.count("```") % 2 == 0
    written = (made.folder / "inference.py").read_text(encoding="utf-8")
    compile(written, "inference.py", "exec")
    assert "raise SystemExit(" not in written.replace(repr(folder.name), "")
    assert rendering.plain_name("模型 v1.0-a_b") == "模型 v1.0-a_b"
