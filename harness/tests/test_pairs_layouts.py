"""python -m harness compare: folders as msprobe and SGLang's dumper write them, in the order of execution."""

import json

import numpy
import pytest
import torch

from harness.tests.test_pairs_files import compared, last_line


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def firsts(text):
    """The names of the table, in order."""
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    return [name for name in rows[1:] if not set(name) <= {"-"}]


# -------- msprobe


# in the order of dump.json: a module stands where its input was seen, as forward_input_data_collect writes it
CALLS = {
    "Module.layers.0.Layer.forward.0": (["input.0"], ["output.0"]),
    "Module.layers.0.linear.Linear.forward.0": (["input.0"], ["output.0"]),
    "Functional.linear.0.forward": (["input.0", "input.1"], ["output.0"]),
    "Functional.silu.0.forward": (["input.0"], ["output.0"]),
    "Module.layers.10.Layer.forward.0": (["input.0"], ["output.0"]),
}
INSIDE = {
    "Module.layers.0.Layer.forward.0": None,
    "Module.layers.0.linear.Linear.forward.0": "Module.layers.0.Layer.forward.0",
    "Functional.linear.0.forward": "Module.layers.0.linear.Linear.forward.0",
    "Functional.silu.0.forward": "Module.layers.0.Layer.forward.0",
    "Module.layers.10.Layer.forward.0": None,
}
EXECUTED = [
    "Module.layers.0.Layer.forward.0.input.0",
    "Module.layers.0.linear.Linear.forward.0.input.0",
    "Functional.linear.0.forward.input.0",
    "Functional.linear.0.forward.input.1",
    "Functional.linear.0.forward.output.0",
    "Module.layers.0.linear.Linear.forward.0.output.0",
    "Functional.silu.0.forward.input.0",
    "Functional.silu.0.forward.output.0",
    "Module.layers.0.Layer.forward.0.output.0",
    "Module.layers.10.Layer.forward.0.input.0",
    "Module.layers.10.Layer.forward.0.output.0",
]


def msprobe_dump(root, *, wrong=(), place="step0/rank0", suffix=".pt", task="tensor", construct=True, lost=()):
    """A dump of msprobe with the task tensor at the level mix.

    Written as github.com/Ascend/msprobe does: the folders as core/dump/service.py (create_dirs), the names of the files
    as core/dump/data_dump/data_processor/base.py (get_save_file_path), dump.json, stack.json and construct.json as
    core/dump/data_dump/json_writer.py, with the fields of examples/quick_start/gpu_dump/step1/proc2016/dump.json.
    """
    folder = root / place
    (folder / "dump_tensor_data").mkdir(parents=True)
    data = {}
    for call, (inputs, outputs) in CALLS.items():
        entries = {}
        for part in (*inputs, *outputs):
            name = f"{call}.{part}"
            tensor = seeded(4, 8, seed=len(name)) * (1.05 if name in wrong else 1)
            fields = {
                "type": "torch.Tensor",
                "dtype": "torch.float32",
                "shape": [4, 8],
                "Max": float("nan"),
                "requires_grad": False,
            }
            entries[part] = fields | ({"data_name": f"{name}{suffix}"} if task == "tensor" else {})
            if task == "tensor" and name not in lost:
                file = folder / "dump_tensor_data" / f"{name}{suffix}"
                torch.save(tensor, file) if suffix == ".pt" else numpy.save(file, tensor.numpy())
        constant = {"type": "int", "value": 1}
        data[call] = {
            "input_args": [entries[input_] for input_ in inputs] + [None, constant],
            "input_kwargs": {},
            "is_recompute": False,
        }
        data[call]["output"] = [entries[output] for output in outputs]
    document = {"task": task, "level": "mix", "framework": "pytorch", "dump_data_dir": None, "data": data}
    (folder / "dump.json").write_text(json.dumps(document, indent=1))
    (folder / "stack.json").write_text(json.dumps({"0": [list(CALLS), ["File model.py, line 1, in forward"]]}))
    if construct:
        (folder / "construct.json").write_text(json.dumps(INSIDE))
    return root


def test_a_dump_of_msprobe_is_read_in_the_order_of_execution(tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side) for side in "ab"]
    status, text = compared(capsys, *paths)
    assert status == 0 and firsts(text) == [f"step0/rank0/{name}" for name in EXECUTED]


@pytest.mark.parametrize("place", range(1, len(EXECUTED)))
def test_the_first_that_differs_is_the_first_in_execution(place, tmp_path, capsys):
    msprobe_dump(tmp_path / "a", wrong=EXECUTED[place:])
    msprobe_dump(tmp_path / "b")
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 1 and last_line(text).startswith(f"first that differs: step0/rank0/{EXECUTED[place]}: ")


def test_steps_and_ranks_are_in_order_and_a_process_number_is_no_name(tmp_path, capsys):
    for side, number in (("a", 4711), ("b", 815)):
        for step in (2, 10):
            msprobe_dump(tmp_path / side, place=f"step{step}/proc{number}")
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 0 and firsts(text) == [f"step{step}/proc/{name}" for step in (2, 10) for name in EXECUTED]


def test_the_folder_of_a_rank_pairs_with_that_of_another_process(tmp_path, capsys):
    msprobe_dump(tmp_path / "a")
    msprobe_dump(tmp_path / "b", place="step3/proc7", suffix=".npy")
    status, text = compared(capsys, tmp_path / "a/step0/rank0", tmp_path / "b/step3/proc7")
    assert status == 0 and firsts(text) == EXECUTED


def test_without_construct_json_the_order_is_that_of_dump_json(tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side, construct=False) for side in "ab"]
    names = [f"step0/rank0/{call}.{part}" for call, parts in CALLS.items() for part in (*parts[0], *parts[1])]
    assert firsts(compared(capsys, *paths)[1]) == names


def test_a_tensor_that_dump_json_names_and_nobody_saved_fails_at_its_place(tmp_path, capsys):
    lost = EXECUTED[4]
    paths = [msprobe_dump(tmp_path / side, lost=[lost]) for side in "ab"]
    status, text = compared(capsys, *paths)
    assert firsts(text) == [f"step0/rank0/{name}" for name in EXECUTED]
    assert status == 1 and last_line(text).startswith(f"first that differs: step0/rank0/{lost}: ")
    assert f"dump.json names '{lost}.pt', and dump_tensor_data has no such file: the dump is not complete" in text


def test_a_file_that_dump_json_does_not_name_is_compared_too(tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side) for side in "ab"]
    torch.save(torch.ones(2), paths[0] / "step0/rank0/dump_tensor_data/Module.extra.forward.0.output.0.pt")
    status, text = compared(capsys, *paths)
    assert status == 1 and "FAIL step0/rank0/Module.extra.forward.0.output.0: " in text


def test_a_dump_of_statistics_is_refused_with_what_to_do(tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side, task="statistics") for side in "ab"]
    status, text = compared(capsys, *paths)
    assert status == 1 and text.count("\n") == 1
    assert 'was dumped with the task \'statistics\', which saves no tensors; dump again with "task": "tensor"' in text


@pytest.mark.parametrize("damage", ["{", "[]", '{"data": [], "task": 1}', '{"task": 1, "data": {"x": {}, "x": {}}}'])
def test_a_damaged_dump_json_fails_and_the_tensors_are_compared(damage, tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side) for side in "ab"]
    (paths[0] / "step0/rank0/dump.json").write_text(damage)
    status, text = compared(capsys, *paths)
    assert status == 1 and "cannot read dump.json" in text and f"{len(EXECUTED)} PASS, 1 FAIL" in text


def test_a_damaged_construct_json_fails_and_the_order_is_that_of_dump_json(tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side) for side in "ab"]
    (paths[0] / "step0/rank0/construct.json").write_text("{")
    status, text = compared(capsys, *paths)
    assert status == 1 and f"{len(EXECUTED)} PASS, 1 FAIL" in text and "cannot read construct.json: " in text


def test_a_construct_json_that_goes_in_circles_ends(tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side) for side in "ab"]
    for path in paths:
        circle = INSIDE | {"Module.layers.0.Layer.forward.0": "Functional.silu.0.forward"}
        (path / "step0/rank0/construct.json").write_text(json.dumps(circle))
    status, text = compared(capsys, *paths)
    assert status == 0 and sorted(firsts(text)) == sorted(f"step0/rank0/{name}" for name in EXECUTED)


def test_a_data_name_leads_to_no_other_folder(tmp_path, capsys):
    paths = [msprobe_dump(tmp_path / side) for side in "ab"]
    torch.save(torch.ones(2), tmp_path / "secret.pt")
    for path in paths:
        file = path / "step0/rank0/dump.json"
        file.write_text(file.read_text().replace(f"{EXECUTED[0]}.pt", "../../../../secret.pt"))
    status, text = compared(capsys, *paths)
    assert status == 1 and "dump.json names '../../../../secret.pt', and dump_tensor_data has no such file" in text


def test_another_dump_json_is_no_dump_of_msprobe(tmp_path, capsys):
    for side in "ab":
        (tmp_path / side).mkdir()
        (tmp_path / side / "dump.json").write_text('{"name": "mine"}')
        torch.save(torch.ones(2), tmp_path / side / "x.pt")
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 0 and firsts(text) == ["x"]


# -------- SGLang


def sglang_dump(root, values, *, folder="dump_20260101_000000_000000", first=1, **tags):
    """A dump of SGLang's dumper: `values` are (name, value, further tags) in the order of execution.

    Written as python/sglang/srt/debug_utils/dumper.py of sgl-project/sglang does: the folder and the tags of a file's
    name as _dump_single and _format_tags, its content {"value", "meta"} as output_data there; read_meta and
    _add_duplicate_index of dump_loader.py read it.
    """
    (root / folder).mkdir(parents=True)
    for index, (name, value, further) in enumerate(values, first):
        full = (
            {"step": 0, "rank": 0, "dump_index": index, "name": name, "recompute_status": "disabled"} | tags | further
        )
        meta = full | {
            "world_rank": 0,
            "world_size": 1,
            "sglang_parallel_info": {"tp_rank": 0, "tp_size": 1},
            "dims": "t h",
        }
        file = "___".join(f"{key}={item}" for key, item in full.items()) + ".pt"
        torch.save(
            {"value": value, "meta": {key: item for key, item in meta.items() if item is not None}},
            root / folder / file,
        )
    return root


def forward(*, factor=1.0, layers=(0, 1, 2)):
    steps = [("embed", seeded(4, 8), {})]
    for layer in layers:
        wrong = factor if layer >= 1 else 1
        steps += [
            ("mlp__out", seeded(4, 8, seed=layer) * wrong, {"layer_id": layer}),
            ("attn__out", seeded(4, 8, seed=9) * wrong, {"layer_id": layer}),
        ]
    return steps


def test_a_dump_of_sglang_is_paired_by_its_tags_whatever_the_index_and_the_folder(tmp_path, capsys):
    sglang_dump(tmp_path / "a", forward(), folder="dump_20260101_000000_000001", first=40)
    sglang_dump(tmp_path / "b", forward(), folder="dump_20260202_000000_000002")
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    names = [f"{name} step=0 rank=0 layer_id={layer}" for layer in range(3) for name in ("mlp__out", "attn__out")]
    assert status == 0 and firsts(text) == ["embed step=0 rank=0", *names]


def test_the_first_of_sglang_is_the_first_by_its_index(tmp_path, capsys):
    sglang_dump(tmp_path / "a", forward(factor=1.05))
    sglang_dump(tmp_path / "b", forward())
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 1 and last_line(text).startswith("first that differs: mlp__out step=0 rank=0 layer_id=1: ")


def test_a_name_that_is_dumped_twice_is_told_apart_by_its_count(tmp_path, capsys):
    twice = [("x", torch.ones(2), {}), ("x", torch.zeros(2) + 5, {})]
    sglang_dump(tmp_path / "a", twice)
    sglang_dump(tmp_path / "b", twice[::-1])
    assert compared(capsys, tmp_path / "a", tmp_path / "a")[0] == 0
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 1 and firsts(text) == ["x step=0 rank=0", "x step=0 rank=0 duplicate_index=1"] and "2 FAIL" in text


def test_ranks_and_steps_are_compared_apart(tmp_path, capsys):
    values = [
        ("x", torch.ones(2), {"rank": 0}),
        ("x", torch.ones(2) * 2, {"rank": 1}),
        ("x", torch.ones(2) * 3, {"step": 1}),
    ]
    sglang_dump(tmp_path / "a", values)
    sglang_dump(tmp_path / "b", values[:1] + values[2:])
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert (
        status == 1 and "2 PASS, 1 FAIL" in text and last_line(text).startswith("first that differs: x step=0 rank=1: ")
    )


def test_what_an_older_dumper_wrote_pairs_with_the_newer(tmp_path, capsys):
    sglang_dump(tmp_path / "a", forward())
    (tmp_path / "b").mkdir()
    for index, (name, value, further) in enumerate(
        forward(), 1
    ):  # forward_pass_id for step, the value alone, no recompute_status
        tags = {"forward_pass_id": 0, "rank": 0, "name": name, "dump_index": index} | further
        torch.save(value, tmp_path / "b" / ("___".join(f"{key}={tag}" for key, tag in tags.items()) + ".pt"))
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 0 and "7 PASS" in text


def test_a_value_that_is_no_tensor_is_told_and_fails_where_one_side_has_a_tensor(tmp_path, capsys):
    sglang_dump(tmp_path / "a", [("x", torch.ones(2), {}), ("rids", ["r1"], {}), ("y", None, {})])
    sglang_dump(tmp_path / "b", [("x", torch.ones(2), {}), ("rids", ["r2"], {}), ("y", torch.ones(2), {})])
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 1 and "1 PASS, 1 FAIL" in text
    assert "not compared, since neither side holds a tensor there: rids step=0 rank=0" in text
    assert "FAIL y step=0 rank=0: " in text and "the value there is no tensor" in text


def test_values_without_tensors_alone_are_no_pass(tmp_path, capsys):
    sglang_dump(tmp_path / "a", [("rids", ["r1"], {})])
    status, text = compared(capsys, tmp_path / "a", tmp_path / "a")
    assert status == 1 and "nothing was compared" in text


def test_a_value_of_several_tensors_has_their_names(tmp_path, capsys):
    values = [("out", {"k": torch.ones(2), "v": [torch.zeros(3) + 2]}, {})]
    sglang_dump(tmp_path / "a", values)
    assert firsts(compared(capsys, tmp_path / "a", tmp_path / "a")[1]) == [
        "out step=0 rank=0/k",
        "out step=0 rank=0/v.0",
    ]


def test_the_meta_of_a_dump_is_not_compared(tmp_path, capsys):
    sglang_dump(tmp_path / "a", forward(), world_size=8)
    sglang_dump(tmp_path / "b", forward(), world_size=8)
    for file in (tmp_path / "b").rglob("*.pt"):
        loaded = torch.load(file)
        loaded["meta"]["sglang_parallel_info"] = {"tp_rank": 3}
        torch.save(loaded, file)
    assert compared(capsys, tmp_path / "a", tmp_path / "b")[0] == 0


def test_msprobe_against_another_tool_takes_a_map(tmp_path, capsys):
    msprobe_dump(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in EXECUTED:
        torch.save(seeded(4, 8, seed=len(name)), tmp_path / "b" / f"{name}.pt")
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b", "--strip-prefix", "step0/rank0/")
    assert status == 0 and firsts(text) == EXECUTED
    assert (
        f"all {len(EXECUTED)} unpaired names of A pair after --strip-prefix step0/rank0/"
        in compared(capsys, tmp_path / "a", tmp_path / "b")[1]
    )
