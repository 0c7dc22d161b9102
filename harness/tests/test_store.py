"""The store of references: exact bits back, damage seen, room kept, and keys that change with what computes."""

import copy
import importlib.util
import os
import subprocess
import sys
import threading
import time
import types
import warnings

import pytest
import torch
from torch import nn

from harness import Case, open_device, validate
from harness.errors import CaseError, HarnessError
from harness.reference import Models, copy_module, weights_digest
from harness.reference import store as store_module
from harness.reference.store import Store, StoreWarning, code_digest, key_of


def key(**fields):
    return key_of(**{"role": "cpu", "weights": "w", "code": "c", "inputs": "i", "dtype": torch.float16} | fields)


def same_bits(one, other):
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = (item.resolve_conj().resolve_neg().contiguous().reshape(-1) for item in (one, other))
    return not left.numel() or torch.equal(left.view(torch.uint8), right.view(torch.uint8))


# -------- entries


def test_every_kind_of_tensor_comes_back_exactly_and_in_order(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    waves = torch.complex(base, base.flip(0))
    outputs = {
        "z": base,
        "a": base[1:3],
        "turned": base.t(),
        "__metadata__": torch.tensor(3),
        "": torch.tensor(-0.0),
        "spread": torch.ones(1).expand(5, 3),
        "the same": base,
        "none": torch.zeros(0, 5),
        "special": torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-45]),
        "é 1": waves,
        "conjugate": waves.conj(),
        "imaginary": waves.conj().imag,
        "one wave": torch.tensor(1 + 2j),
        "no wave": waves[:0],
        "learned": nn.Parameter(torch.ones(2)),
        "wide waves": waves.to(torch.complex128),
    }
    for name in "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn".split():
        outputs[name] = torch.tensor([[0, 1, 2]]).to(getattr(torch, name))
        outputs[f"one {name}"] = torch.tensor(1).to(getattr(torch, name))
    store = Store(tmp_path / "new" / "store")
    assert store.load(key()) is None
    store.save(key(), outputs)
    result = store.load(key())
    assert list(result) == list(outputs)
    assert [name for name in outputs if not same_bits(result[name], outputs[name])] == []
    assert (store.read, store.written) == (1, 1)
    assert os.listdir(store.path(key()).parent) == [store.path(key()).name]
    store.save(key(role="golden"), {})
    assert store.load(key(role="golden")) == {}


def _cut(path, other):
    path.write_bytes(path.read_bytes()[:-3])


def _empty(path, other):
    path.write_bytes(b"")


def _flip(path, other):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def _swap(path, other):
    path.write_bytes(other.read_bytes())


def _strange(path, other):
    path.write_text("{}")


def _plain(path, other):
    from safetensors.torch import save_file

    save_file({"output": torch.ones(3)}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "damaged"),
        (_empty, "damaged"),
        (_flip, "damaged: its content has sha256"),
        (_swap, "the entry of another key (inputs: 'other' where 'i' was expected)"),
        (_strange, "damaged"),
        (_plain, "format None where 'reference-store/1' was expected"),
    ],
)
def test_a_damaged_or_foreign_entry_is_told_removed_and_computed_again(tmp_path, damage, words):
    store = Store(tmp_path)
    store.save(key(), {"output": torch.arange(6.0)})
    store.save(key(inputs="other"), {"output": torch.arange(6.0)})
    path = store.path(key())
    damage(path, store.path(key(inputs="other")))
    with pytest.warns(StoreWarning) as told:
        assert store.load(key()) is None
    text = str(told[0].message)
    assert str(path) in text and words in text and "computed again" in text
    assert not path.exists() and store.read == 0
    store.save(key(), {"output": torch.arange(6.0)})
    assert store.load(key())["output"].sum() == 15


def test_the_least_recently_used_goes_first_and_never_what_was_just_written(tmp_path):
    store = Store(tmp_path, limit=10_000)
    keys = [key(inputs=str(number)) for number in range(4)]
    for age, item in zip((400, 300, 200), keys[:3], strict=True):
        store.save(item, {"output": torch.zeros(1000)})
        os.utime(store.path(item), (time.time() - age,) * 2)
    assert not store.path(keys[0]).exists()  # three of 4 kB each do not fit
    assert store.load(keys[1]) is not None  # used: now the younger of the two
    store.save(keys[3], {"output": torch.zeros(1000)})
    assert [store.path(item).exists() for item in keys] == [False, True, False, True]
    small = Store(tmp_path, limit=10)
    small.save(keys[0], {"output": torch.zeros(1000)})
    assert [store.path(item).exists() for item in keys] == [True, False, False, False]


def test_a_process_that_is_stopped_leaves_no_entry_and_its_leavings_go(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_module.os, "replace", stopped)
        store.save(key(), {"output": torch.ones(3)})
    assert os.listdir(store.path(key()).parent) == [] and store.load(key()) is None
    left = [store.path(key()).with_name(f"{name}{store_module.UNFINISHED}") for name in ("old", "new")]
    for item in left:
        item.write_bytes(b"half")
    os.utime(left[0], (time.time() - 2 * store_module.ABANDONED,) * 2)
    store.prune()
    assert [path.exists() for path in left] == [False, True]


def test_many_may_write_and_read_at_once(tmp_path):
    outputs = {"output": torch.arange(50_000.0)}
    wrong = []

    def work():
        store = Store(tmp_path, limit=450_000)  # two entries: pruning happens all the time
        for number in range(20):
            each = key(inputs=str(number % 4))
            store.save(each, outputs)
            result = store.load(each)
            if result is not None and not torch.equal(result["output"], outputs["output"]):
                wrong.append(number)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert wrong == []
    assert not [path for path in tmp_path.rglob("*") if path.suffix == store_module.UNFINISHED]


def test_a_directory_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="cannot be written .* with --precision-reference-store"):
        Store(tmp_path / "file" / "store")
    store = Store(tmp_path / "store")
    (tmp_path / "store" / key().sha256[:2]).write_text("in the way")
    with pytest.raises(HarnessError, match=r"store cannot be written \(.*exists"):
        store.save(key(), {"output": torch.ones(1)})


# -------- keys


def test_each_field_makes_another_key_and_their_order_none():
    plain = key(threads=2, extra={"b": 1, "a": [torch.float64, None]})
    assert plain == key(extra={"a": [torch.float64, None], "b": 1}, threads=2)
    changes = dict(
        role="golden", weights="v", code="d", inputs="j", dtype="float32", torch="1.0", threads=3, extra=None, more=1
    )
    changed = [
        key(**{"threads": 2, "extra": {"b": 1, "a": [torch.float64, None]}} | {name: value})
        for name, value in changes.items()
    ]
    assert len({item.sha256 for item in [plain, *changed]}) == len(changes) + 1
    assert plain.fields["dtype"] == "float16" and plain.fields["torch"] == torch.__version__ and len(plain.sha256) == 64
    assert key().fields["threads"] == torch.get_num_threads()
    with pytest.raises(ValueError, match="key field extra: object"):
        key(extra=object())


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.register_buffer("steps", torch.arange(3), persistent=False)


def test_the_digest_of_weights_sees_values_names_dtypes_and_buffers():
    model = Layers()
    seen = [weights_digest(model)]
    assert weights_digest(copy.deepcopy(model)) == seen[0]
    model.steps[1] = 7
    seen.append(weights_digest(model))
    with torch.no_grad():
        model.second.bias[2] += 1e-7
    seen.append(weights_digest(model))
    turned = copy.deepcopy(model)
    turned.first.weight = nn.Parameter(turned.first.weight.t().contiguous().t())
    assert weights_digest(turned) == seen[-1]  # the same values, laid out otherwise
    seen.append(weights_digest(model.double()))
    model.third = model.second
    seen.append(weights_digest(model))
    assert len(set(seen)) == len(seen)
    with pytest.raises(CaseError, match="on meta has no content"):
        weights_digest(nn.Linear(2, 2, device="meta"))


HELPER = "def scaled(x):\n    return x * 2\n"
MODEL = """
from torch import nn
from helper_of_test import scaled

class Part(nn.Module):
    power = 2

    def __init__(self, offset=1.0):
        super().__init__()
        self.offset = offset
        self.names = {"b", "a", "c", "d"}
        self.act = lambda x: x

    def forward(self, x):
        return self.act(scaled(x)) + self.offset

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.part(self.linear(x))

def pick(k=0):
    return lambda model, x: model(x)[k]
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a model's two files into a folder of their own and imports them."""
    count = iter(range(100))

    def load(model=MODEL, helper=HELPER):
        folder = tmp_path / f"folder{next(count)}"
        folder.mkdir()
        for name, text in (("helper_of_test", helper), ("model_of_test", model)):
            (folder / f"{name}.py").write_bytes(text.encode())
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
        return module

    return load


LAMBDAS = """
import torch
from torch import nn

class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)

ONES = {"sin": lambda x: x.sin(), "cos": lambda x: x.cos(), "half": lambda x: x * 0.5,
        "third": lambda x: x * 0.25}
if torch.ones(1) > 0:
    def twice(x):
        return x * 2
    first = twice
    def twice(x):
        return x + x.abs()
"""


def test_functions_of_one_name_in_one_file_have_digests_of_their_own(load):
    """Lambdas on one line and on two lines, and functions that are defined twice."""
    module = load(LAMBDAS)
    functions = [*module.ONES.values(), module.first, module.twice]
    digests = [code_digest(module.Applied(function)) for function in functions]
    assert len(set(digests)) == len(functions) == 6
    again = load(LAMBDAS)
    assert digests == [code_digest(again.Applied(item)) for item in (*again.ONES.values(), again.first, again.twice)]


def test_a_reference_is_not_read_for_another_lambda(load, tmp_path):
    module, models = load(LAMBDAS), Models(store=Store(tmp_path / "store"))
    device = open_device("cpu")
    for name in ("sin", "cos"):
        case = Case(
            name=name, model=lambda: module.Applied(module.ONES[name]), inputs=lambda g: torch.rand(4, generator=g)
        )
        verdict = validate(case, 1, device, models=models)
        assert verdict.passed and verdict.comparison.max_diff == 0, name


def test_the_digest_of_code_changes_with_whatever_computes(load):
    plain = load()
    digests = {"plain": code_digest(plain.Model())}
    digests["another forward"] = code_digest(load(MODEL.replace("+ self.offset", "- self.offset")).Model())
    digests["a helper in another file"] = code_digest(load(helper=HELPER.replace("2", "3")).Model())
    digests["a forward function"] = code_digest(plain.Model(), plain.pick())
    digests["what it closes over"] = code_digest(plain.Model(), plain.pick(1))
    for name, change in {
        "an attribute": lambda model: setattr(model.part, "offset", 1.5),
        "an attribute of torch's": lambda model: setattr(model.linear, "in_features", 4),
        "a tensor that is no buffer": lambda model: setattr(model.part, "offset", torch.ones(1)),
        "another such": lambda model: setattr(model.part, "offset", torch.zeros(1)),
        "a hook": lambda model: model.part.register_forward_hook(lambda module, args, output: output + 1),
        "a method put into one": lambda model: setattr(model, "forward", types.MethodType(lambda self, x: x, model)),
        "training": lambda model: model.train(False),
        "another layer": lambda model: setattr(model, "linear", nn.Identity()),
    }.items():
        model = plain.Model()
        change(model)
        digests[name] = code_digest(model)
    assert len(set(digests.values())) == len(digests), digests


def test_the_digest_of_code_is_the_same_in_other_folders_copies_and_with_other_line_ends(load):
    model = load().Model()
    expected = code_digest(model)
    assert code_digest(load(MODEL.replace("\n", "\r\n")).Model()) == expected
    assert code_digest(copy_module(model, dtype=torch.float16, device=torch.device("cpu"))) == expected
    model.root = "/home/somebody/weights"
    moved = code_digest(model)
    model.root = "/data/weights"
    assert code_digest(model) == moved


def test_a_function_put_into_a_package_is_seen(monkeypatch):
    from _pytest import mark  # any package with a class of its own will do

    holder = nn.Identity()
    holder.held = mark.KeywordMatcher(frozenset())
    before = code_digest(holder)
    assert code_digest(holder) == before
    with monkeypatch.context() as patch:
        patch.setattr(mark.KeywordMatcher, "__call__", lambda self, name: True)
        inside = code_digest(holder)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[mark.KeywordMatcher.__module__], "deselect_by_mark", lambda items, config: None)
        beside = code_digest(holder)
    assert len({before, inside, beside}) == 3


def test_code_without_a_file_counts_by_its_bytecode():
    def made(text):
        space = {"nn": nn, "__name__": "nowhere"}
        exec(f"class Model(nn.Module):\n    def forward(self, x):\n        return {text}", space)
        return code_digest(space["Model"]())

    assert made("x + 1") == made("x + 1")
    assert (
        len({made("x + 1"), made("x - 1"), made("x + 2"), made("[x + 1 for _ in x]"), made("[x + 2 for _ in x]")}) == 5
    )


def test_another_process_gives_the_same_digests(load, tmp_path):
    module = load()
    program = tmp_path / "other.py"
    program.write_text(
        "from harness.reference.store import code_digest\nimport model_of_test as "
        "m\nprint(code_digest(m.Model(), m.pick(2)))\n"
    )
    paths = os.pathsep.join([str(tmp_path / "folder0"), os.getcwd(), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "5"}
    run = subprocess.run(
        [sys.executable, str(program)], env=environment, cwd="/", capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == code_digest(module.Model(), module.pick(2)), run.stderr
