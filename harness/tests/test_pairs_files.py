"""python -m harness compare: what a file claims is held against what it has before data is read, and one name is one
tensor."""

import io
import json
import os
import pickle
import resource
import socket
import struct
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file

from harness.commands.main import main
from harness.pairs import files
from harness.pairs import side as side_module
from harness.pairs.pickled import read_pickle

MIB = 1 << 20


def compared(capsys, *words):
    """The exit status of the command, and its standard output and error."""
    status = main(["compare", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def last_line(text):
    return text.rstrip("\n").rsplit("\n", 1)[-1]


def npy_bytes(array):
    file = io.BytesIO()
    numpy.save(file, array)
    return file.getvalue()


def write_npz(path, *members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.fixture
def little_memory():
    """What would read a bomb whole ends in a MemoryError, not in a machine without memory."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 700 * MIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# -------- name


@pytest.mark.parametrize("order", [(1.0, 2.0), (2.0, 1.0)], ids=["wrong_first", "wrong_last"])
def test_two_members_of_one_name_fail_whichever_is_right(order, tmp_path, capsys):
    numpy.savez(tmp_path / "b.npz", output=numpy.full(4, 1, numpy.float32))
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_npz(
            tmp_path / "a.npz", *(("output.npy", npy_bytes(numpy.full(4, value, numpy.float32))) for value in order)
        )
    status, text = compared(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert status == 1
    assert "two members are called 'output': 'output.npy' (member 1) and 'output.npy' (member 2)" in text


def test_a_member_with_and_one_without_the_suffix_are_one_name(tmp_path, capsys):
    data = npy_bytes(numpy.ones(3, numpy.float32))
    path = write_npz(tmp_path / "a.npz", ("x.npy", data), ("x", data), ("y.npy", data))
    status, text = compared(capsys, path, path)
    assert status == 1 and "'x.npy' (member 1) and 'x' (member 2)" in text and "1 PASS, 1 FAIL" in text


def test_a_member_is_read_by_its_own_name(tmp_path, capsys):
    one, two = (npy_bytes(numpy.full(3, value, numpy.float32)) for value in (1, 2))
    write_npz(tmp_path / "a.npz", ("x.npy", one), ("x.npy.npy", one))
    write_npz(tmp_path / "b.npz", ("x.npy", one), ("x.npy.npy", two))
    status, text = compared(capsys, tmp_path / "a.npz", tmp_path / "b.npz")
    assert status == 1 and "1 PASS, 1 FAIL" in text and last_line(text).startswith("first that differs: x.npy: ")


def test_two_files_of_one_name_are_both_named(tmp_path, capsys):
    for side in "ab":
        (tmp_path / side).mkdir()
        numpy.save(tmp_path / side / "x.npy", numpy.ones(3, numpy.float32))
    torch.save(torch.zeros(3), tmp_path / "a" / "x.pt")
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert "two files or keys have the name 'x', and one would hide the other: 'x.npy' and 'x.pt'; rename one" in text


def test_names_that_a_mapping_makes_one_are_both_named(tmp_path, capsys):
    save_file({"module.x": torch.ones(2), "x": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    status, text = compared(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--strip-prefix", "module.")
    assert status == 1 and "('module.x') as 'module.x'" in text and "and 'a.safetensors' ('x')" in text


def test_keys_that_are_written_alike_are_both_named(tmp_path, capsys):
    torch.save({1: torch.ones(2), "1": torch.zeros(2)}, tmp_path / "a.pt")
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    assert status == 1 and "two tensors in it have the name '1': [1] and ['1']" in text


def torch_zip(path, *, pickled=None, storages=None, compression=zipfile.ZIP_STORED, twice=False):
    """A .pt as torch.save writes it, of {"w": four ones}, with parts replaced."""
    torch.save({"w": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(parts)).split("/")[0]
    if pickled is not None:
        parts[f"{root}/data.pkl"] = pickled(parts[f"{root}/data.pkl"])
    parts |= {f"{root}/data/{key}": data for key, data in (storages or {}).items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        if twice:
            archive.writestr(f"{root}/data/0", struct.pack("4f", 9, 9, 9, 9))
    return path


def test_a_key_that_stands_twice_in_a_pickle_is_refused(tmp_path, capsys):
    def doubled(data):  # {"w": t, "w": t}: the second entry repeats the first by its memo
        begin, end = data.index(b"X\x01\x00\x00\x00w"), data.rindex(b"s.")
        entry = data[begin:end]
        return data[: end + 1] + entry + b"s."

    path = torch_zip(tmp_path / "a.pt", pickled=doubled)
    assert torch.load(path, weights_only=True)["w"].tolist() == [1, 1, 1, 1]  # torch sees one
    torch_zip(tmp_path / "b.pt")
    assert compared(capsys, tmp_path / "b.pt", tmp_path / "b.pt")[0] == 0
    status, text = compared(capsys, path, tmp_path / "b.pt")
    assert status == 1 and "the key 'w' stands twice in one dictionary, and one would hide the other" in text


def test_a_storage_that_stands_twice_in_a_zip_is_refused(tmp_path, capsys):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = torch_zip(tmp_path / "a.pt", twice=True)
    status, text = compared(capsys, path, torch_zip(tmp_path / "b.pt"))
    assert status == 1 and "two members are called" in text and "/data/0'" in text


def write_safetensors(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_key_that_stands_twice_in_a_safetensors_header_is_not_passed(tmp_path, capsys):
    entry = b'"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    path = write_safetensors(tmp_path / "a.safetensors", b"{" + entry + b", " + entry + b"}", struct.pack("2f", 1, 2))
    save_file({"w": torch.tensor([1.0, 2.0])}, tmp_path / "b.safetensors")
    status, text = compared(capsys, path, tmp_path / "b.safetensors")
    assert status == 1 and ("two keys of its header are called 'w'" in text or "cannot read a.safetensors" in text)


# -------- read


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A .npz of 1 MiB that holds 1 GiB of zeros."""
    path = tmp_path_factory.mktemp("bomb") / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        with archive.open("y.npy", "w", force_zip64=True) as member:
            numpy.lib.format.write_array_header_1_0(
                member, {"descr": "<f4", "fortran_order": False, "shape": (256 * MIB,)}
            )
            for _ in range(64):
                member.write(bytes(16 * MIB))
    return path


def test_a_bomb_of_another_shape_is_told_by_its_header(bomb, tmp_path, capsys, little_memory):
    numpy.savez(tmp_path / "b.npz", y=numpy.arange(35, dtype=numpy.float32))
    status, text = compared(capsys, bomb, tmp_path / "b.npz")
    assert status == 1 and last_line(text) == "first that differs: y: shape (268435456,) where (35,) was expected"


def test_a_bomb_of_the_same_shape_is_not_inflated(bomb, capsys, little_memory):
    status, text = compared(capsys, bomb, bomb)
    assert status == 1
    assert "'y' is not read: it takes 1 GiB in memory where the file holds" in text
    assert "a tensor may take 512 MiB more than the file holds; give --max-inflated=1" in text


@pytest.mark.parametrize(("limit", "status"), [("1023KiB", 1), ("1MiB", 0)])
def test_the_limit_on_inflated_bytes_has_two_sides(limit, status, tmp_path, capsys):
    numpy.savez_compressed(
        tmp_path / "a.npz", y=numpy.ones(MIB // 4 + 256, numpy.float32)
    )  # 1 MiB and what it takes in the file
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        (member,) = archive.infolist()
    numpy.savez_compressed(tmp_path / "a.npz", y=numpy.ones((MIB + member.compress_size) // 4, numpy.float32))
    result, text = compared(capsys, tmp_path / "a.npz", tmp_path / "a.npz", "--max-inflated", limit)
    assert result == status, text


def test_a_tensor_without_a_shape_costs_no_other(tmp_path, capsys):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    torch.save({"n": nested, "p": torch.nn.Parameter(torch.ones(2))}, tmp_path / "a.pt")
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    try:
        torch.load(tmp_path / "a.pt", weights_only=True)
    except pickle.UnpicklingError:  # torch 2.15 and later do not read such a tensor back
        assert status == 1 and "_rebuild_nested_tensor, which may run code, so it is not read" in text
        return
    assert status == 1 and "FAIL n: " in text and "1 PASS, 1 FAIL" in text


def test_a_sparse_tensor_is_compared_dense_where_that_is_small(tmp_path, capsys):
    dense = torch.diag(torch.arange(1.0, 5))
    torch.save(dense.to_sparse(), tmp_path / "a.pt")
    torch.save(dense, tmp_path / "b.pt")
    assert compared(capsys, tmp_path / "a.pt", tmp_path / "b.pt")[0] == 0
    torch.save(dense * 2, tmp_path / "b.pt")
    assert compared(capsys, tmp_path / "a.pt", tmp_path / "b.pt")[0] == 1


BOMBS = {
    "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (2**31,)),
    "expanded": lambda: torch.zeros(1).expand(2**31),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_few_bytes_that_stand_for_gibibytes_are_not_read(name, tmp_path, capsys, little_memory):
    torch.save(BOMBS[name](), tmp_path / "a.pt")
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    assert status == 1 and "is not read: it takes 8 GiB in memory where the file holds" in text
    torch.save(torch.ones(3), tmp_path / "b.pt")
    assert "shape (2147483648,) where (3,) was expected" in compared(capsys, tmp_path / "a.pt", tmp_path / "b.pt")[1]


def test_a_file_with_holes_is_not_read(tmp_path, capsys, little_memory):
    with open(tmp_path / "a.npy", "wb") as file:
        numpy.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 30,)})
        file.truncate(file.tell() + (4 << 30))
    if not os.stat(tmp_path / "a.npy").st_blocks * 512 < MIB:
        pytest.skip("this file system keeps no holes")
    status, text = compared(capsys, tmp_path / "a.npy", tmp_path / "a.npy")
    assert status == 1 and "is not read: it takes 4 GiB" in text


def test_a_compressed_pt_is_read_and_a_bomb_of_one_is_not(tmp_path, capsys, little_memory):
    path = torch_zip(tmp_path / "a.pt", compression=zipfile.ZIP_DEFLATED)
    assert compared(capsys, path, torch_zip(tmp_path / "b.pt"))[0] == 0
    torch_zip(path, compression=zipfile.ZIP_DEFLATED, storages={"0": bytes(200 * MIB)})
    status, text = compared(capsys, path, tmp_path / "b.pt", "--max-inflated", "100MiB")
    assert status == 1 and "it takes 200 MiB in memory where the file holds" in text


def test_a_storage_that_claims_more_than_its_record_is_refused(tmp_path, capsys):
    def larger(data):
        assert data.count(b"K\x04") >= 2  # 4 elements in the storage, 4 in the shape
        return data.replace(b"K\x04", b"K\x08")

    status, text = compared(capsys, torch_zip(tmp_path / "a.pt", pickled=larger), torch_zip(tmp_path / "b.pt"))
    assert status == 1 and "its storage '0' claims 32 bytes where the file holds 16 bytes" in text


def test_a_large_file_is_mapped_and_compared(tmp_path, capsys):
    x = {"u": torch.randn(200_000, generator=torch.Generator().manual_seed(0)), "v": torch.arange(200_000)}
    torch.save(x, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size > files.SMALL_FILE
    torch.save(x | {"u": x["u"] * 1.01}, tmp_path / "b.pt")
    assert compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")[0] == 0
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "b.pt")
    assert status == 1 and "1 PASS, 1 FAIL" in text and last_line(text).startswith("first that differs: u: ")
    opened = files.open_tensors(tmp_path / "a.pt", files.LIMIT)
    assert opened.whole is None and opened.headers["u"].stored == opened.headers["u"].memory == 800_000


def test_a_legacy_file_is_read_and_one_that_claims_too_much_is_refused(tmp_path, capsys):
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.ones(4)}, tmp_path / "b.pt")
    assert compared(capsys, tmp_path / "a.pt", tmp_path / "b.pt")[0] == 0
    data = (tmp_path / "a.pt").read_bytes().replace(b"K\x04", b"J" + struct.pack("<i", 1 << 30))
    (tmp_path / "a.pt").write_bytes(data)
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "b.pt")
    assert status == 1 and "its storages claim 4 GiB where the file holds" in text


def test_a_npy_header_that_claims_more_than_the_file_holds_is_refused(tmp_path, capsys):
    with open(tmp_path / "a.npy", "wb") as file:
        numpy.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
        file.write(bytes(64))
    status, text = compared(capsys, tmp_path / "a.npy", tmp_path / "a.npy")
    assert status == 1 and "its header claims 4 TiB of data where the file holds 64 bytes" in text


def test_a_member_that_claims_more_than_it_holds_is_refused(tmp_path, capsys):
    data = npy_bytes(numpy.ones(4, numpy.float32))
    status, text = compared(capsys, *[write_npz(tmp_path / "a.npz", ("x.npy", data[:-4]), ("y.npy", data))] * 2)
    assert (
        status == 1
        and "its header claims 16 bytes of data where the member holds 12 bytes" in text
        and "1 PASS, 1 FAIL" in text
    )


def test_shapes_are_compared_without_a_look_at_damaged_data(tmp_path, capsys):
    numpy.savez(tmp_path / "a.npz", y=numpy.ones((3, 40_000), numpy.float32))
    numpy.savez(tmp_path / "b.npz", y=numpy.ones((3, 5), numpy.float32))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    place = data.rindex(struct.pack("<f", 1))
    data[place] ^= 1  # the checksum of the member fails once its data is read
    (tmp_path / "a.npz").write_bytes(data)
    assert "shape (3, 40000) where (3, 5) was expected" in compared(capsys, tmp_path / "a.npz", tmp_path / "b.npz")[1]
    assert "cannot read 'y'" in compared(capsys, tmp_path / "a.npz", tmp_path / "a.npz")[1]


def test_a_file_of_the_other_byte_order_is_read(tmp_path, capsys):
    numpy.save(tmp_path / "a.npy", numpy.arange(4, dtype=">f4"))
    numpy.save(tmp_path / "b.npy", numpy.arange(4, dtype="<f4"))
    assert compared(capsys, tmp_path / "a.npy", tmp_path / "b.npy")[0] == 0


# -------- file


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_pipes_sockets_devices_and_folders_do_not_block(suffix, tmp_path, capsys, monkeypatch):
    for side in "ab":
        (tmp_path / side).mkdir()
    os.mkfifo(tmp_path / "a" / f"pipe{suffix}")
    (tmp_path / "a" / f"device{suffix}").symlink_to("/dev/zero")
    (tmp_path / "a" / f"folder{suffix}").mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        monkeypatch.chdir(tmp_path / "a")  # the path of a socket is short
        opened.bind(f"socket{suffix}")
        status, text = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert status == 1
    for name, kind in (("pipe", "a named pipe (FIFO)"), ("device", "a device"), ("socket", "a socket")):
        assert f"cannot read {name}{suffix}: it is {kind} where a regular file was expected" in text
    assert f"folder{suffix} is a folder without tensors where a file was expected" in text
    status, text = compared(capsys, tmp_path / "a" / f"pipe{suffix}", tmp_path / "b")
    assert (
        status == 1 and "it is a named pipe (FIFO) where a regular file was expected" in text and text.count("\n") == 1
    )


def test_a_list_of_msprobe_that_is_a_pipe_does_not_block(tmp_path, capsys):
    (tmp_path / "dump_tensor_data").mkdir()
    torch.save(torch.ones(2), tmp_path / "dump_tensor_data" / "Torch.add.0.forward.output.0.pt")
    os.mkfifo(tmp_path / "dump.json")
    status, text = compared(capsys, tmp_path, tmp_path)
    assert status == 1 and "cannot read dump.json: it is a named pipe" in text and "1 PASS, 1 FAIL" in text


# -------- pickles


class Evil:
    def __reduce__(self):
        return print, ("planted code ran",)


def test_a_refused_pickle_is_told_without_escape_codes_and_unsafe_advice(tmp_path, capsys):
    torch.save({"w": torch.ones(2), "evil": Evil()}, tmp_path / "a.pt")
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    assert status == 1 and "planted code ran" not in text
    assert "print, which may run code, so it is not read; save the tensors alone" in text
    assert "\x1b" not in text and "weights_only=False" not in text


def test_a_pickle_that_asks_for_zeros_is_refused(tmp_path, capsys):
    bomb = b"\x80\x02cbuiltins\nbytearray\n" + b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."
    with pytest.raises(ValueError, match="asks builtins.bytearray for 1099511627776 zeros"):
        read_pickle(io.BytesIO(bomb))
    (tmp_path / "a.pt").write_bytes(bomb)
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    assert status == 1 and "asks builtins.bytearray for" in text


def test_lists_that_hold_one_another_many_times_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "VALUES", 10_000)
    value = [1.0]
    for _ in range(40):
        value = [value, value]
    torch.save(value, tmp_path / "a.pt")
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    assert status == 1 and "it names more than 10,000 values" in text


@pytest.mark.parametrize("damage", [b"", b"\x80", b"\x80\x02}q\x00u.", b"s.", b"0.", b"R.", b"\x93.", b"h\x05.", b"t."])
def test_a_damaged_pickle_is_a_failure_in_words(damage, tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(damage)
    status, text = compared(capsys, tmp_path / "a.pt", tmp_path / "a.pt")
    assert status == 1 and "cannot read a.pt" in text


def test_small_files_are_kept_up_to_a_number_of_bytes(tmp_path, capsys, monkeypatch):
    for side in "ab":
        (tmp_path / side).mkdir()
        for n in range(4):
            torch.save(torch.full((8,), float(n)), tmp_path / side / f"{n}.pt")
    opened = []
    real = side_module.open_tensors
    monkeypatch.setattr(side_module, "open_tensors", lambda file, limit: opened.append(file) or real(file, limit))
    for room, count in ((4 * (32 + 4096), 8), (32, 14)):  # with room for one, three of a side are read again
        monkeypatch.setattr(side_module, "_CACHE_LIMIT", room)
        opened.clear()
        assert compared(capsys, tmp_path / "a", tmp_path / "b")[0] == 0
        assert len(opened) == count


def test_the_static_reader_reads_what_pickle_writes():
    value = {
        "a": [1, 2.0, "x", b"y", None, True, (1,), (1, 2, 3, 4), {3: 4}, {5}, frozenset({6}), 1 << 70, bytearray(b"z")],
        "b": complex(1, 2),
    }
    for protocol in range(6):
        file = io.BytesIO(pickle.dumps(value, protocol=protocol) + b"next")
        assert read_pickle(file).twice == ()
        assert file.read() == b"next"


# -------- characters


def test_control_characters_in_names_never_reach_the_terminal(tmp_path, capsys):
    for side in "ab":
        (tmp_path / side).mkdir()
        torch.save({"k\x1b[31m": torch.ones(2) * ord(side)}, tmp_path / side / "x\x1b]0;y\x07\u202e.pt")
    odd = os.fsencode(tmp_path / "a") + b"/caf\xe9.pt"  # a name that is not UTF-8
    with open(odd, "wb") as file:
        torch.save(torch.ones(2), file)
    status, text = compared(capsys, tmp_path / "a", tmp_path / "b", "--json", tmp_path / "found.json")
    assert status == 1
    assert not [item for item in text if not item.isprintable() and item != "\n"]
    assert "caf\\udce9" in text.replace("\\\\", "\\")
    assert len(json.loads((tmp_path / "found.json").read_text())["pairs"]) == 2
    status, text = compared(capsys, tmp_path / "no\x1b[31m.pt", tmp_path / "b")
    assert status == 1 and "\x1b" not in text
