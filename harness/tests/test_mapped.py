"""Weights that are a file's pages: told from memory of one's own, mapped in the other process, counted as nothing."""

import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from harness.checkpoints.building import usual_dtypes
from harness.checkpoints.weights import fits_in_float32, require_room, size_of_weights
from harness.commands.model_size import model_size
from harness.errors import MemoryLimitError, RunError
from harness.reference import Models, copy_module, memory
from harness.reference import isolated_process as isolated
from harness.reference import mapped as mapped_files
from harness.reference.isolated_process import CleanProcess
from harness.reference.mapped import LEAST_BYTES, file_parts, mapped, mapped_elements
from harness.reference.memory import GIB, Memory, SizeInMemory, needed
from harness.reference.models import LARGE, size_of

CPU = torch.device("cpu")
SIDE = 1024  # a weight of (SIDE, SIDE) float32 has four times LEAST bytes
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="mapped files are told by Linux's /proc")


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({"small": torch.randn(4), "weight": torch.randn(SIDE, SIDE), "other": torch.randn(SIDE, SIDE)}, path)
    return path


def weight_of(file, name="weight"):
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def linear_of(file):
    linear = nn.Linear(SIDE, SIDE, bias=False).requires_grad_(False)
    linear.weight = nn.Parameter(weight_of(file), requires_grad=False)
    return linear.eval()


# -------- what is told from what


def test_a_weight_that_safetensors_mapped_is_a_part_of_its_file(file):
    weight = weight_of(file)
    (part,) = file_parts([weight.untyped_storage()])
    assert (part.path, part.size) == (str(file), weight.nbytes)
    assert file.read_bytes()[part.offset : part.offset + part.size] == weight.numpy().tobytes()
    files = {}
    again = torch.empty(0).set_(mapped(part, files)).view(SIDE, SIDE)
    assert torch.equal(again, weight) and list(files) == [str(file)]


def test_memory_of_ones_own_and_small_tensors_are_no_parts(file):
    own, small = torch.randn(SIDE, SIDE), weight_of(file, "small")
    assert file_parts([own.untyped_storage(), small.untyped_storage()]) == [None, None]
    assert mapped_elements([own, small, weight_of(file)]) == SIDE * SIDE


def test_the_least_size_from_both_sides(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(LEAST_BYTES // 4), "b": torch.zeros(LEAST_BYTES // 4 - 1)}, path)
    tensors = [weight_of(path, name) for name in ("a", "b")]
    assert [part is not None for part in file_parts(tensor.untyped_storage() for tensor in tensors)] == [True, False]


def test_a_weight_that_was_written_into_is_no_more_the_files(file):
    weight = weight_of(file)
    weight[0, 0] = 7.0  # the page is this process's own from here on
    assert file_parts([weight.untyped_storage()]) == [None]
    assert weight_of(file)[0, 0] != 7.0


def test_a_file_that_is_gone_or_replaced_is_no_part(file, tmp_path):
    weight, before = weight_of(file), file_parts([weight_of(file).untyped_storage()])[0]
    os.rename(file, tmp_path / "kept.safetensors")
    assert file_parts([weight.untyped_storage()]) == [None] or file_parts([weight.untyped_storage()])[0].path != str(
        file
    )
    with pytest.raises(RunError, match="which is there no more"):
        mapped(before, {})
    file.write_bytes(b"\0" * (1 << 20))
    with pytest.raises(RunError, match="was replaced while the model was in use"):
        mapped(before, {})


def test_a_system_without_proc_has_no_parts(file, tmp_path):
    assert mapped_files._mappings(tmp_path) == []


# -------- the process without torch_npu


@pytest.fixture(scope="module")
def clean():
    process = CleanProcess()
    yield process
    process.close()


def _where(number):
    """In the other process: the files and the values of the weight that it has."""
    (weight,) = isolated._models[number].parameters()
    part = file_parts([weight.untyped_storage()])[0]
    return (None if part is None else part.path), float(weight.double().sum()), os.getpid()


def test_mapped_weights_are_not_sent_and_compute_the_same(clean, file, monkeypatch):
    linear, sent = linear_of(file), []
    monkeypatch.setattr(isolated, "_memory", lambda storage: sent.append(storage.nbytes()) or memoryview(bytearray(0)))
    packed = isolated._pack(linear, "the model")
    assert sent == [] and len(packed) == 1
    monkeypatch.undo()
    x = torch.randn(3, SIDE)
    result = clean.forward(linear, x, forward=None, dtype=torch.float32)
    assert torch.equal(result.outputs["output"], linear(x))
    path, total, pid = clean.run(_where, (id(linear), None))
    assert (path, total) == (str(file), float(linear.weight.double().sum())) and pid != os.getpid()


def test_a_weight_that_was_changed_after_loading_is_sent_as_it_is(clean, file):
    linear = linear_of(file)
    linear.weight.data[0, 0] += 1000.0
    x = torch.ones(1, SIDE)
    result = clean.forward(linear, x, forward=None, dtype=torch.float32)
    assert torch.allclose(result.outputs["output"], linear(x), atol=1e-2) and result.outputs["output"][0, 0] > 500
    path, total, _ = clean.run(_where, (id(linear), None))
    assert path is None and total == float(linear.weight.double().sum())


# -------- what it needs


def test_mapped_weights_count_as_nothing_until_they_are_cast():
    size = SizeInMemory(parameters=100, largest=0, mapped=100, built_in="bfloat16")

    def host(dtype, **how):
        return needed(size, dtype, layers=True, **how).host

    assert size.bytes == 0
    assert [host("bfloat16", separate=separate) for separate in (False, True)] == [0, 0]
    assert host("bfloat16", separate=True, emulated=True) == 200
    assert [host("float32", separate=separate) for separate in (False, True)] == [400, 800]  # cast here, and sent
    half = SizeInMemory(parameters=100, largest=0, mapped=60, built_in="bfloat16")
    assert half.bytes == 80 and needed(half, "bfloat16", layers=True, separate=True).host == 160


def test_the_size_of_a_model_knows_what_is_mapped(tmp_path):
    """Asked of large models alone: from one byte above LARGE on."""
    rows = LARGE // (4 * SIDE)
    path = tmp_path / "model.safetensors"
    save_file({"at": torch.zeros(rows, SIDE), "above": torch.zeros(rows + 1, SIDE)}, path)
    for name, count in (("at", 0), ("above", (rows + 1) * SIDE)):
        model = nn.Module()
        model.weight = nn.Parameter(weight_of(path, name), requires_grad=False)
        assert size_of(model).mapped == count
    assert size_of(copy_module(model, dtype=torch.bfloat16, device=CPU)) == SizeInMemory(
        parameters=count, largest=count, mapped=0, built_in="bfloat16"
    )


def test_a_large_mapped_model_keeps_its_files_pages_in_models(tmp_path):
    rows = LARGE // (4 * SIDE) + 1
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(rows, SIDE)}, path)

    def build():
        model = nn.Linear(SIDE, rows, bias=False)
        model.weight = nn.Parameter(weight_of(path), requires_grad=False)
        return model.eval()

    models = Models()
    how = dict(seed=0, dtype=torch.float32, device=CPU)
    with models.untouched("key", build, **how) as model:
        assert mapped_elements(model.parameters()) == rows * SIDE


# -------- before anything is read


@pytest.fixture
def stored(tmp_path):
    """A bert-like checkpoint's weights: 1,000 in bfloat16 and 8 in float32, by headers alone."""
    weights = {"a": torch.zeros(10, 100, dtype=torch.bfloat16), "b": torch.zeros(8), "ids": torch.zeros(5).long()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return tmp_path


def there(monkeypatch, available, total=None):
    found = None if available is None else Memory(total=total or 64 * GIB, available=available)
    monkeypatch.setattr(memory, "read_memory", lambda: found)


def test_sizes_come_from_the_headers(stored):
    assert size_of_weights(stored) == SizeInMemory(parameters=1008, largest=1000, mapped=1008, built_in="bfloat16")


def test_weights_are_refused_before_they_are_cast_where_there_is_no_room(stored, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    monkeypatch.setattr(memory, "resident", lambda: 0)
    for available in (4032, None):
        there(monkeypatch, available)
        require_room(stored, torch.float32)
    there(monkeypatch, 4031)
    require_room(stored, torch.bfloat16)
    with pytest.raises(MemoryLimitError, match=r"1,008 weights in float32 need 0.0 GiB .* use bfloat16, in which"):
        require_room(stored, torch.float32)


def test_float32_is_run_by_default_where_it_has_room(stored, monkeypatch):
    """8 bytes a weight, 4 of them in the process without torch_npu, and 16 for each element of the largest."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    need = 1008 * 8 + 1000 * 16
    for total, fits in ((need, True), (need - 1, False)):
        there(monkeypatch, total, total)
        assert fits_in_float32(stored) is fits
        assert usual_dtypes(stored) == (("float32", "bfloat16") if fits else ("bfloat16",))
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    there(monkeypatch, 2 * need - 1, 2 * need - 1)
    assert not fits_in_float32(stored)


def test_doctor_reads_a_checkpoint(stored, monkeypatch):
    there(monkeypatch, 2 * GIB)
    text, fits = model_size(str(stored), dtype="bfloat16")
    assert fits and text.startswith("1,008 parameters, 1 worker; 2.0 of 64.0 GiB are there now")
    assert "bfloat16  checkpoint in this dtype  1.4 GiB" in text
    text, _ = model_size(str(stored))
    assert text.count("of transformers  ") == 2
    there(monkeypatch, math.ceil(1.4 * GIB) - 1)
    assert not model_size(str(stored), dtype="bfloat16")[1]
