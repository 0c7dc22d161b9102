"""The shim libraries: what the installed torch_npu wants of CANN, read from its own files, compiled into the user's
cache.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from importlib import metadata, util
from pathlib import Path

from harness import compiling
from harness.errors import CompilerError, DeviceError

CORE = "libascendcl.so"
EMPTY = (
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libopapi.so",
    "libascend_hal.so",
)
LIBRARIES = (CORE, *EMPTY)  # in the order in which they are loaded
SOURCE = Path(__file__).with_name("runtime.c")
_KEYS = Path(__file__).with_name("keys.c")
WAITS = Path(__file__).with_name("waits.c")
MARKER = "EMULATED"  # a file in the generated home, so that nobody takes it for a CANN installation


def build(version: str) -> Path:
    """The directory that holds the libraries and a CANN home for the installed wheel, compiled if that was not done
    yet.

    Raises: DeviceError without a C compiler, or when it fails.
    """
    names = f"{version} {_torch()} {os.uname().machine} {EMPTY}".encode()
    key = compiling.key(*(path.read_bytes() for path in (SOURCE, _KEYS, WAITS)), names)
    try:
        return compiling.built(f"cann-{version}-{key}", MARKER, _make)
    except CompilerError as error:
        raise DeviceError(f"the emulated CANN cannot be built: {error}") from None


def _make(made: Path) -> None:
    _write_names(made)
    _compile(made)
    _write_home(made)


def is_emulated_home(path: str | os.PathLike) -> bool:
    """Whether a CANN home was made here: children of an emulated process inherit ASCEND_HOME_PATH."""
    return (Path(path) / MARKER).is_file()


def _write_home(made: Path) -> None:
    """What torch_npu looks for under ASCEND_HOME_PATH and ASCEND_OPP_PATH."""
    for folder in ("runtime", "compiler", "opp"):
        (made / folder).mkdir()
    (made / MARKER).write_text("An emulated CANN: it computes on the CPU and is no evidence about hardware.\n")


# -------- what the wheel wants


LIBRARY_NAMES = (
    "libtorch_npu.so",
    "libtensorpipe.so",
    "libnpu_profiler.so",
)  # the wheel's own that load with `import torch_npu`


def wheel_libraries() -> list[bytes]:
    """The installed wheel's own libraries, the one with the operators first."""
    folder = Path(util.find_spec("torch_npu").origin).parent / "lib"
    return [(folder / name).read_bytes() for name in LIBRARY_NAMES if (folder / name).exists()]


def operator_names(libraries: list[bytes] | None = None) -> list[str]:
    """Every operator whose GetWorkspaceSize the wheel looks up by name, sorted."""
    result = set(re.findall(rb"\0(acl[A-Za-z0-9_]+)GetWorkspaceSize(?=\0)", (libraries or wheel_libraries())[0]))
    return sorted(name.decode() for name in result)


def wanted_symbols(libraries: list[bytes] | None = None) -> list[str]:
    """CANN's functions that the wheel's libraries are linked against, sorted."""
    names = {name for data in libraries or wheel_libraries() for name in undefined_symbols(data)}
    return sorted(name for name in names if _is_canns(name))


def looked_up_names(libraries: list[bytes] | None = None) -> list[str]:
    """CANN's functions, operators apart, that the wheel names in its text: those it looks up at run time and lives
    without, sorted.
    """
    libraries = libraries or wheel_libraries()
    result = {name.decode() for name in re.findall(rb"(?<=\0)(?:acl|rt|hal|Hccl)[A-Za-z0-9_]+(?=\0)", libraries[0])}
    operators = {item for name in operator_names(libraries) for item in (name, f"{name}GetWorkspaceSize")}
    return sorted(name for name in result - operators if _is_canns(name) and not name.startswith("aclnn"))


def defined_names() -> set[str]:
    """The functions that runtime.c holds."""
    source = SOURCE.read_text(encoding="utf-8")
    return set(re.findall(r"\b(\w+)\(", source)) | set(re.findall(r"ATTRIBUTE\((\w+)\)", source))


def _is_canns(name: str) -> bool:
    return bool(re.match(r"(acl[a-z]*[A-Z]|rt[A-Z]|hal[A-Z]|ge[A-Z]|Hccl|Msprof)", name))


def undefined_symbols(data: bytes) -> list[str]:
    """Names that a 64-bit little-endian ELF library leaves undefined, from its dynamic symbol table."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise DeviceError(
            "torch_npu holds a library that is not 64-bit little-endian ELF; the emulated CANN needs x86-64 or "
            "aarch64 Linux"
        )
    (at,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, at + index * size) for index in range(count)]
    names = []
    for _, kind, _, _, offset, length, link, _, _, entry in sections:
        if kind != 11:  # SHT_DYNSYM
            continue
        strings = sections[link][4]
        for position in range(offset, offset + length, entry):
            name, _, _, section = struct.unpack_from("<IBBH", data, position)
            if section == 0 and name:
                names.append(data[strings + name : data.index(b"\0", strings + name)].decode())
    return names


def _write_names(made: Path) -> None:
    defined, operators = defined_names(), operator_names()
    lines = [f"OPERATOR({index}, {name})\n" for index, name in enumerate(operators)]
    (made / "names.inc").write_text("".join(lines))
    missing = [name for name in wanted_symbols() if name not in defined]
    header = Path(util.find_spec("torch_npu").origin).parent / HEADER
    text = header.read_text(encoding="utf-8", errors="replace") if header.exists() else ""
    (made / "keys.inc").write_text(allocator_keys(undefined_symbols(wheel_libraries()[0]), text, _torch()))
    quiet = [f"QUIET({name})\n" for name in missing if name.startswith("Msprof")]
    (made / "wanted.inc").write_text(
        "".join([*quiet, *(f"WANTED({name})\n" for name in missing if not name.startswith("Msprof"))])
    )


# -------- allocator options


HEADER = (
    "include/torch_npu/csrc/core/npu/NPUAllocatorConfig.h"  # in the wheel: lists the names that libtorch_npu registers
)


def allocator_keys(undefined: list[str], header: str, torch: str) -> str:
    """What keys.c has to know of a wheel: the function that returns torch's set of allocator options, and the names
    that the wheel adds.

    `undefined` are the undefined symbols of libtorch_npu.so, `header` is the text of its HEADER, `torch` the version of
    torch that it needs. Empty where the wheel adds no names, as torch_npu up to 2.12. Where the header lists none,
    keys.c refuses a build of torch that adds names of its own.
    """
    functions = [name for name in undefined if "AcceleratorAllocatorConfig14getMutableKeys" in name]
    if not functions:
        return ""
    listed = re.search(r"getKeys\(\)\s*\{[^{}]*\{([^{}]*)\}", header)
    names = re.findall(r'"([a-z0-9_]+)"', listed[1]) if listed else []
    lines = [f'#define KEYS_FUNCTION "{functions[0]}"', f'#define TORCH "{torch}"', *(f"KEY({name})" for name in names)]
    return "\n".join([*lines, ""])


def _torch() -> str:
    """The version of the installed torch without its build: 2.13.0 for 2.13.0+cu130."""
    return metadata.version("torch").split("+")[0]


# -------- compiling


def _compile(made: Path) -> None:
    command = [*compiling.compiler(), "-shared", "-fPIC", "-O1", "-w"]
    core = [
        f"-Wl,-soname,{CORE}",
        "-I",
        str(made),
        str(SOURCE),
        str(_KEYS),
        str(WAITS),
        "-o",
        str(made / CORE),
        "-lpthread",
        "-ldl",
    ]
    compiling.run_compiler([*command, *core])
    (made / "empty.c").write_text("")
    for name in EMPTY:
        compiling.run_compiler(
            [
                *command,
                f"-Wl,-soname,{name}",
                "-Wl,--no-as-needed",
                str(made / "empty.c"),
                "-o",
                str(made / name),
                "-L",
                str(made),
                "-lascendcl",
            ]
        )


def wheel_version() -> str:
    """The installed torch_npu's version.

    Raises: DeviceError when this is not Linux, it is not installed, or it wants another torch than is installed.
    """
    if not sys.platform.startswith("linux"):
        raise DeviceError(f"torch_npu has wheels for Linux only and this is {sys.platform}; use --device cpu")
    try:
        version = metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        raise DeviceError(
            "torch_npu is not installed; on an Ascend machine install the one for its torch, elsewhere "
            "pip install -e '.[emulated]' for the emulated device, or use --device cpu"
        ) from None
    wanted = next((text for text in metadata.requires("torch_npu") or [] if re.match(r"torch\s*(==|>=|~=)", text)), "")
    numbers = re.search(r"(\d+\.\d+(?:\.\d+)?)", wanted)
    result = metadata.version("torch")
    if numbers and not (result.split("+")[0] + ".").startswith(numbers[1] + "."):
        raise DeviceError(
            f"torch_npu {version} needs torch {numbers[1]} and torch {result} is installed: pip install "
            f"torch=={numbers[1]}"
        )
    return version
