"""The commands as a user types them: infer, convert, bench, doctor, report; their errors are one line on standard
error.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.commands import health
from harness.commands.main import COMMANDS, main
from harness.conformance.options import PARTS, parser_of
from harness.models import inference
from harness.models.aimv2 import LAYOUTS, PHOTO
from harness.models.digits import DIGITS_FOLDER
from harness.run import timing
from harness.tests.checkpoints import model, write
from harness.tests.environment import of_a_shell
from harness.tests.needs import needs_torch_npu

ROOT = Path(__file__).parents[2]


def run(capsys, *words):
    """(exit status, standard output, standard error) of one command, in this process."""
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def fails(capsys, *words):
    """The one line that a failing command writes."""
    status, out, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("harness ")]
    assert status == 1 and out == "" and len(lines) == 1
    return lines[0]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.delenv("MODEL_DIR", raising=False)
    return write(tmp_path / "model", model("head").state_dict())


# -------- infer


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=needs_torch_npu)])
def test_infer_says_what_ran_and_writes_what_came_out(capsys, checkpoint, tmp_path, dtype, device):
    output = tmp_path / "features.safetensors"
    status, out, _ = run(
        capsys, "infer", "--model-dir", checkpoint, "--dtype", dtype, "--device", device, "--output", output
    )
    assert status == 0
    assert f"from {checkpoint} (--model-dir), sha256 " in out and "noise, seed 42, (1, 3, 56, 56)" in out
    assert ("EMULATED" in out) == (device == "emulated")
    result = load_file(output)
    assert result["features"].shape == (1, 16, 64) and result["pooled"].shape == (1, 64)
    assert result["features"].dtype == getattr(torch, dtype)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_infer_takes_a_picture_and_the_environment(capsys, checkpoint, monkeypatch):
    monkeypatch.setenv("MODEL_DIR", str(checkpoint))
    status, out, _ = run(capsys, "infer", "--image", PHOTO, "--device", "cpu")
    assert status == 0 and "(MODEL_DIR)" in out and f"{PHOTO}, (1, 3, 56, 56) float32" in out


def test_infer_takes_seeds(capsys, checkpoint):
    outs = [run(capsys, "infer", "--model-dir", checkpoint, "--device", "cpu", "--seed", seed)[1] for seed in (1, 1, 2)]
    features = [next(line for line in out.splitlines() if line.startswith("features")) for out in outs]
    assert features[0] == features[1] != features[2]


def test_native_models_take_any_picture(capsys, tmp_path):
    source = write(tmp_path / "native", model("native").state_dict())
    _, out, _ = run(capsys, "infer", "--model-dir", source, "--image", PHOTO, "--device", "cpu")
    assert "(1, 672, 64)" in out  # 21 by 32 patches of 300 by 451 pixels


def test_without_a_checkpoint_it_says_that_the_weights_are_seeded(monkeypatch):
    monkeypatch.delenv("MODEL_DIR", raising=False)
    monkeypatch.setattr(inference, "build", lambda name, seed: (name, seed))
    built, words = inference.open_model(None)
    assert built == ("aimv2-large-patch14-224-distilled", 0)
    assert "random weights, seeded:0 (no --model-dir, no MODEL_DIR)" in words


def test_infer_refuses_bad_input_before_it_builds_anything(capsys, checkpoint, tmp_path, monkeypatch):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    monkeypatch.setattr(inference, "build", lambda *given, **more: pytest.fail("the weights were built"))
    assert "no such model: /nowhere" in fails(capsys, "infer", "--model-dir", "/nowhere")
    assert "is not a picture that Pillow knows" in fails(capsys, "infer", "--image", text)
    assert "no picture at" in fails(capsys, "infer", "--image", tmp_path / "absent.png")
    assert "cannot write there" in fails(capsys, "infer", "--output", tmp_path / "absent" / "x.safetensors")
    assert "is a directory; name a file" in fails(capsys, "infer", "--output", tmp_path)
    assert "no device is called 'tpu'" in fails(capsys, "infer", "--device", "tpu", "--model-dir", checkpoint)


# -------- convert


def test_convert_and_back_by_command(capsys, checkpoint, tmp_path):
    status, out, _ = run(capsys, "convert", checkpoint, tmp_path / "there", "--to", "transformers")
    assert status == 0 and "(apple) ->" in out
    assert run(capsys, "convert", tmp_path / "there", tmp_path / "back", "--to", "apple")[0] == 0
    first, second = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "exists already" in fails(capsys, "convert", checkpoint, tmp_path / "back", "--to", "apple")
    expected = f"no layout is called 'none'; there are {', '.join(LAYOUTS)}"
    assert expected in fails(capsys, "convert", checkpoint, tmp_path / "new", "--to", "none")
    assert "no such model" in fails(capsys, "convert", tmp_path / "absent", tmp_path / "new", "--to", "apple")
    assert not (tmp_path / "new").exists()


# -------- bench


def ticking(steps):
    """A clock that advances by these milliseconds, one at each second reading."""
    readings = [0.0]
    for step in steps:
        readings += [readings[-1] + step / 1e3] * 2
    return iter(readings).__next__


def test_timings_are_those_of_the_clock():
    steps = [500, 7, *range(1, 101)]  # the first forwards warm up
    calls = []
    result = timing.measure(
        lambda: calls.append("f"), lambda: calls.append("s"), iterations=100, warmup=2, clock=ticking(steps)
    )
    assert (
        result.avg_ms == pytest.approx(50.5)
        and result.p50_ms == pytest.approx(50)
        and result.p90_ms == pytest.approx(90)
        and result.p99_ms == pytest.approx(99)
        and (result.min_ms, result.max_ms) == (pytest.approx(1), pytest.approx(100))
        and result.first_ms == pytest.approx(500)
    )
    assert calls == ["s", "f", "s"] * 102


def test_a_99th_percentile_needs_a_hundred_forwards():
    result = timing.measure(lambda: None, lambda: None, iterations=99, warmup=0)
    assert result.p99_ms is None and result.n == 99
    with pytest.raises(ValueError, match="measure nothing"):
        timing.measure(lambda: None, lambda: None, iterations=0, warmup=0)


@needs_torch_npu
def test_bench_times_the_cpu_beside_the_device_and_says_what_it_is_worth(capsys):
    words = [
        "bench",
        "--model-dir",
        DIGITS_FOLDER,
        "--batch-size",
        1,
        4,
        "--iters",
        2,
        "--warmup",
        1,
        "--device",
        "emulated",
    ]
    status, out, _ = run(capsys, *words)
    assert status == 0
    rows = [line for line in out.splitlines() if line.startswith("| aimv2")]
    assert len(rows) == 4 and sum("Ascend910B4" in row for row in rows) == 2
    assert all(" – |" in row for row in rows)  # no p99 of two forwards
    assert "EMULATED" in out and "its times say nothing about hardware" in out
    assert "EMULATED" not in run(capsys, *words[:-1], "cpu")[1]


# -------- doctor


@needs_torch_npu
def test_doctor_prints_the_stack_and_lets_the_device_answer(capsys):
    status, out, _ = run(capsys, "doctor", "--device", "emulated")
    assert status == 0
    assert "Ascend910B4" in out and "conv_allow_hf32" in out and "a product and a sum on npu:0" in out


@needs_torch_npu
def test_doctor_fails_with_the_reason():
    command = [sys.executable, "-m", "harness", "doctor", "--device", "npu"]
    done = subprocess.run(command, cwd=ROOT, env=of_a_shell(), capture_output=True, text=True, timeout=120)
    assert (
        done.returncode == 1
        and "FAILED" in done.stdout
        and "CANN cannot be loaded" in done.stdout
        and "Traceback" not in done.stderr
    )


@needs_torch_npu
def test_doctor_fails_a_device_that_computes_wrongly():
    from harness import emulator, open_device

    open_device("emulated")
    with emulator.fault("aclnnM*", kind="offset", by=1.0):
        text, healthy = health.doctor("emulated")
    assert not healthy and "answer       FAILED" in text


@pytest.mark.parametrize(
    ("version", "cann", "result"),
    [
        ("2.9.0.post2", "9.0.0", "ok"),
        ("2.9.0.post2", "9.1.0", "ok"),
        ("2.9.0", "8.5.1", "ok"),
        ("2.7.1", "8.3.RC1", "ok"),
        ("2.7.1", "8.2.RC1", "warning"),
        ("2.9.0.post1", "8.5.1", "unlisted"),
        ("2.13.0", "9.1.0", "unlisted"),
        ("2.9.0", None, "unlisted"),
    ],
)
def test_versions_are_held_against_the_published_table(version, cann, result):
    assert health.cann_verdict(version, cann, "pair")[0] == result


def test_numpy_2_beside_an_old_cann_is_warned_of():
    assert health._numpy_check({"backend": "npu", "cann": "8.2.RC1", "numpy": "2.1.0"})[1] == "warning"
    assert health._numpy_check({"backend": "npu", "cann": "8.5.0", "numpy": "2.1.0"}) is None
    assert health._numpy_check({"backend": "npu", "cann": "8.2.RC1", "numpy": "1.26.4"}) is None


# -------- help


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert re.search(rf"^example:\n +python -m harness {command} ", capsys.readouterr().out, re.M)


def test_help_of_all_shows_an_example_and_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "example:\n  python -m harness card " in text
    assert re.findall(r"^    ([a-z]+)\b", text, re.M) == [command.name for command in COMMANDS]


def printed_help(module, *words):
    """What `python -m MODULE … --help` prints, its exit status, and whether it imported torch."""
    code = (
        f"import runpy, sys; sys.argv = {['x', *words, '--help']!r}\n"
        f"try:\n    runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("\n0 False\n"), done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["harness.conformance", "harness.benchmarks"])
def test_help_of_the_measuring_parts_shows_an_example_without_torch(module):
    assert f"example:\n  python -m {module} " in printed_help(module)


@pytest.mark.parametrize("part", PARTS)
def test_help_of_a_part_of_conformance_shows_an_example_that_it_takes_without_torch(part):
    command = PARTS[part].command
    text = printed_help("harness.conformance", part)
    assert " ".join(text.split()).startswith(f"usage: {command} {part} ")  # it may be wrapped behind the name
    assert f"\nexample:\n  {command} {part} " in text
    parser_of(part).parse_args(PARTS[part].example.split())


def test_help_of_emulate_lists_its_options_without_torch():
    code = (
        "import sys; from harness.commands.main import main\ntry:\n    main(['emulate', '--help'])\nexcept "
        "SystemExit:\n    pass\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for option in ("--fault", "--devices", "--memory", "--soc", "--cann", "-m"):
        assert f"\n  {option} " in done.stdout, option


def test_help_imports_no_torch():
    code = (
        "import sys; from harness.commands.main import main\ntry:\n    main(['infer', '--help'])\nexcept "
        "SystemExit:\n    pass\nsys.exit('torch' in sys.modules)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--image" in done.stdout
    assert time.perf_counter() - begin < 10


def test_report_is_rendered_again(capsys, tmp_path):
    from harness.report import build
    from harness.report import write as write_report

    write_report(build([], stack={"device": "x"}, backend="cpu"), tmp_path)
    status, out, _ = run(capsys, "report", tmp_path / "precision.json", "--lang", "zh")
    assert status == 0 and "精度报告" in out
    assert run(capsys, "report", tmp_path / "precision.json", "--output", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert "no report at" in fails(capsys, "report", tmp_path / "absent.json")
