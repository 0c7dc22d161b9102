"""Reference outputs kept by content: what was computed once, from the same weights, code and inputs, is read and not
computed again.

A key says everything that a CPU's result depends on, and an entry is believed only when its own digest and its key are
right.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import importlib.metadata as metadata
import json
import os
import platform
import re
import sys
import sysconfig
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.reference import content_digest, digest, run_cpu

FORMAT = "reference-store/1"
SUFFIX = ".safetensors"
UNFINISHED = ".part"
ABANDONED = 3600  # seconds after which an unfinished file belongs to a process that was killed
_LIMIT = 20 << 30  # bytes


class StoreWarning(UserWarning):
    """An entry of a reference store was damaged or not what its name says; it was removed and is computed again."""


# -------- the key


@dataclass(frozen=True)
class Key:
    """What a reference depends on: fields by name, as JSON."""

    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.text)


def key_of(*, role: str, weights: str, code: str, inputs: str, dtype: str | torch.dtype, **extra: Any) -> Key:
    """The key of one reference. `role` is "cpu", "golden" or "forecast"; `weights`, `code` and `inputs` are digests.

    What changes a CPU's sums is added unless given: the version of torch, `threads`, the processor, the precision of
    float32 products. `extra` takes anything more: strings, numbers, None, dtypes, and lists and mappings of them.

    Raises: ValueError for a field that does not read the same on another machine.
    """
    fields = {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "float32_matmul": torch.get_float32_matmul_precision(),
        "role": role,
        "weights": weights,
        "code": code,
        "inputs": inputs,
        "dtype": dtype,
        **extra,
    }
    return Key(json.dumps({name: _plain(name, value) for name, value in fields.items()}, sort_keys=True))


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    raise ValueError(
        f"key field {name}: {type(value).__name__} {value!r} where a string, a number, a dtype or a list of "
        "them was expected"
    )


# -------- the store


class Store:
    """Named tensors by key in a directory of at most `limit` bytes; several processes may use it at once.

    `read` and `written` count the entries that were served and added.

    Raises: HarnessError when the directory cannot be written.
    """

    def __init__(self, directory: Path | str, limit: int = _LIMIT):
        self.directory = Path(directory)
        self.limit = limit
        self.read = 0
        self.written = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise self._unwritable(error) from None

    def path(self, key: Key) -> Path:
        """Where the entry of `key` is, or would be."""
        name = key.sha256
        return self.directory / name[:2] / f"{name}{SUFFIX}"

    def load(self, key: Key) -> dict[str, Tensor] | None:
        """The outputs kept under `key`, in the order and with the bits that they had; None where there are none.

        An entry that is damaged or belongs to another key is removed with a StoreWarning.
        """
        path = self.path(key)
        try:
            outputs = _read(path, key)
        except FileNotFoundError:
            return None
        except _Unusable as error:
            with contextlib.suppress(OSError):
                path.unlink()
            warnings.warn(
                f"reference store: {path}: {error}; it was removed and is computed again", StoreWarning, stacklevel=2
            )
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the last use; access times are switched off on many machines
        self.read += 1
        return outputs

    def save(self, key: Key, outputs: Mapping[str, Tensor]) -> None:
        """Keep CPU tensors under `key`, then make room.

        Raises: HarnessError when the directory cannot be written.
        """
        path = self.path(key)
        tensors, header = _packed(key, outputs)
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}-{os.urandom(4).hex()}{UNFINISHED}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, unfinished, metadata=header)
                os.replace(unfinished, path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        except (OSError, safetensors.SafetensorError) as error:
            raise self._unwritable(error) from None
        self.written += 1
        self.prune(keep=path)

    def prune(self, keep: Path | None = None) -> None:
        """Remove the entries that were not used for longest until the rest fits into the limit; never `keep`."""
        result = []
        for path in self.directory.glob("??/*"):
            with contextlib.suppress(OSError):  # another process prunes too
                seen = path.stat()
                if path.suffix == UNFINISHED:
                    if time.time() - seen.st_mtime > ABANDONED:
                        path.unlink()
                elif path.suffix == SUFFIX:
                    result.append((seen.st_mtime_ns, seen.st_size, path))
        total = sum(size for _, size, _ in result)
        for _, size, path in sorted(result):
            if total <= self.limit:
                return
            if path != keep:
                with contextlib.suppress(OSError):
                    path.unlink()
                total -= size

    def _unwritable(self, error: Exception) -> HarnessError:
        return HarnessError(
            f"reference store {self.directory} cannot be written ({error}); "
            "name a directory that you may write and that has room with --precision-reference-store, or leave "
            "the option out"
        )


class _Unusable(Exception):
    """What is wrong with an entry."""


# safetensors names no others in every version from 0.4.3
_SAFETENSORS_DTYPES = {
    getattr(torch, name) for name in "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64".split()
}


def _packed(key: Key, outputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What safetensors writes: tensors by position, since it reserves a name and sorts them; and the header that tells
    the rest.
    """
    plain = {name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for name, tensor in outputs.items()}
    tensors, storages = {}, set()
    for index, tensor in enumerate(plain.values()):
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.clone() if storage in storages else tensor  # safetensors refuses tensors that share memory
        storages.add(storage)
        tensors[str(index)] = _as_stored(tensor)
    listed = [{"name": name, "dtype": _name(item.dtype), "shape": list(item.shape)} for name, item in plain.items()]
    return tensors, {"format": FORMAT, "key": key.text, "sha256": digest(plain), "outputs": json.dumps(listed)}


def _as_stored(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, and one of a dtype that safetensors may lack as its bytes."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return tensor if tensor.dtype in _SAFETENSORS_DTYPES else tensor.reshape(-1).view(torch.uint8)


def _as_it_was(stored: Tensor, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if stored.dtype == dtype:
        return stored
    return torch.view_as_complex(stored) if dtype.is_complex else stored.view(dtype).reshape(shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(path: Path, key: Key) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise _Unusable(f"format {header.get('format')!r} where {FORMAT!r} was expected")
            if header["key"] != key.text:
                raise _Unusable(f"the entry of another key ({_differing(header['key'], key)})")
            listed = json.loads(header["outputs"])
            outputs = {
                item["name"]: _as_it_was(
                    file.get_tensor(str(index)), getattr(torch, item["dtype"]), item["shape"]
                ).clone()
                for index, item in enumerate(listed)
            }  # cloned: get_tensor may map the file, which would then keep its room on the disk
            result = digest(outputs)
    except (FileNotFoundError, _Unusable):
        raise
    except Exception as error:  # noqa: BLE001  damage shows in the header, its JSON, a dtype, a shape or the length
        raise _Unusable(f"damaged ({type(error).__name__}: {error})") from None
    if result != header["sha256"]:
        raise _Unusable(f"damaged: its content has sha256 {result[:12]}… where {header['sha256'][:12]}… was expected")
    return outputs


def _differing(text: str, key: Key) -> str:
    there, asked = json.loads(text), key.fields
    names = [name for name in sorted({*there, *asked}) if there.get(name) != asked.get(name)]
    return "; ".join(f"{name}: {there.get(name)!r} where {asked.get(name)!r} was expected" for name in names)


# -------- the weights


# -------- the code


def code_digest(model: nn.Module, forward: Callable | None = None) -> str:
    """sha256 over what computes: the code that `model` and `forward` reach, and the settings that it reads.

    - Of your own code, the whole source file of every class and function that is reached: from the classes of the
      submodules and from `forward`, through the names, closures, defaults and decorators that they use, across files.
      Where there is no file, as in a notebook, the bytecode.
    - Of an installed package, its name and version; and your own functions that were put in place of its functions or
      methods.
    - Of the harness, what runs the model: how float16 products are summed, and the rounding rules of forecasts.
    - The attributes of each submodule that are no parameters or buffers, hooks, and configs, to the bottom.

    It is the same in another process and on another machine: addresses and the order of sets do not count, and of an
    absolute path only the last part does. What is found by a name made at run time, as in getattr(module, "f" + name),
    is not seen.
    """
    walk = _Walk(registered=[*model.parameters(), *model.buffers()])
    for name, module in model.named_modules(remove_duplicate=False):
        walk.say(f"module {name}: {walk.word(module)}")
    walk.say(f"forward: {walk.word(forward)}")
    walk.say(f"run by: {walk.word(run_cpu)}")
    return walk.finish()


_BOOKKEEPING = {  # of nn.Module: what changes no result, or is walked by name
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}
_OF_EVERY_CLASS = {
    "__module__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__annotations__",
    "__annotations_cache__",
    "__annotate__",
    "__annotate_func__",
    "__firstlineno__",
    "__static_attributes__",
    "__qualname__",
    "__dataclass_fields__",
    "__abstractmethods__",
    "_abc_impl",
    "__slots__",
    "__parameters__",
    "__orig_bases__",
    "__match_args__",
}
_OF_THIS_MACHINE = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}  # of transformers' configs
_SIMPLE_TYPES = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(None),
    bool,
    int,
    float,
    complex,
    bytes,
    type(...),
)


class _Walk:
    """Says in lines what is reached from some values; each object, class and function once, by a number in the order of
    finding.
    """

    def __init__(self, registered: Iterable[Tensor]):
        self._total = hashlib.sha256()
        self._registered = {id(item) for item in registered}
        self._numbers: dict[int, int] = {}
        self._found: list[Any] = []  # kept, so that an id stays the object's own
        self._open: set[int] = set()  # containers being told
        self._files: set[str] = set()

    def say(self, line: str) -> None:
        self._total.update(f"{line}\n".encode(errors="backslashreplace"))

    def finish(self) -> str:
        done = 0
        while done < len(self._found):
            self.say(f"{done}: {self._described(self._found[done])}")
            done += 1
        for line in sorted(self._files):
            self.say(line)
        return self._total.hexdigest()

    def word(self, value: Any) -> str:
        """A value in one word, with its content where it is small, else a number under which its content follows."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, str):
            return repr(PurePath(value).name if os.path.isabs(value) else value)
        if isinstance(value, PurePath):
            return repr(value.name if value.is_absolute() else value.as_posix())
        if isinstance(value, _SIMPLE_TYPES):
            return repr(value)
        if isinstance(value, Tensor) and id(value) in self._registered:
            return "registered"
        if isinstance(value, Tensor):
            return "tensor on meta" if value.is_meta else content_digest(value)
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        if isinstance(value, (set, frozenset, list, tuple, Mapping)):
            return self._container(value)
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._found)
            self._found.append(value)
        return f"#{self._numbers[id(value)]}"

    def _container(self, value: Any) -> str:
        """What is in a container, by content: which of two equal tuples is shared is an accident of how a model was
        made.
        """
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            if isinstance(value, (set, frozenset)):
                inside = sorted(self._apart(item) for item in value)
            elif isinstance(value, Mapping):
                pairs = sorted(((self._apart(key), item) for key, item in value.items()), key=lambda pair: pair[0])
                inside = [f"{key}: {self.word(item)}" for key, item in pairs]
            else:
                inside = [self.word(item) for item in value]
            return f"{type(value).__qualname__}({', '.join(inside)})"
        finally:
            self._open.discard(id(value))

    def _apart(self, value: Any) -> str:
        """A value in a set, which has no order in which to number it."""
        simple = isinstance(value, (str, PurePath, enum.Enum, tuple, *_SIMPLE_TYPES))
        if simple:
            return self.word(value)
        return _title(value if callable(value) else type(value))

    def _described(self, value: Any) -> str:
        if isinstance(value, types.ModuleType):
            return self._origin(getattr(value, "__file__", None) or "") or value.__name__
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return f"method {self.word(value.__func__)} of {self.word(value.__self__)}"
        if isinstance(value, functools.partial):
            return f"partial {self.word(value.func)} {self.word(value.args)} {self.word(value.keywords)}"
        if isinstance(value, (staticmethod, classmethod)):
            return f"{type(value).__name__} {self.word(value.__func__)}"
        if isinstance(value, property):
            return f"property {self.word(value.fget)}"
        wrapped = getattr(value, "__wrapped__", None) if not isinstance(value, nn.Module) else None
        if wrapped is not None:
            return f"{_title(type(value))} around {self.word(wrapped)}"
        if callable(value) and hasattr(value, "__qualname__"):
            return _title(value)  # written in C
        return f"{self.word(type(value))}{self._attributes(value)}"

    def _attributes(self, value: Any) -> str:
        """The attributes of an object; torch's own objects that are no modules are told by their class, as they hold
        its machinery.
        """
        if not isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] in (
            "torch",
            "threading",
            "logging",
            "_thread",
        ):
            return ""
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            attributes |= {
                name: getattr(value, name)
                for name in ((slots,) if isinstance(slots, str) else slots)
                if hasattr(value, name)
            }
        hidden = _OF_THIS_MACHINE | (_BOOKKEEPING if isinstance(value, nn.Module) else set())
        words = []
        for name in sorted(
            key for key in attributes.keys() - hidden - {"__dict__", "__weakref__"} if not _is_cache(key)
        ):
            # hooks are kept by a count of all hooks in the process
            content = (
                list(attributes[name].values())
                if name in ("_forward_hooks", "_forward_pre_hooks") and isinstance(value, nn.Module)
                else attributes[name]
            )
            words.append(f" {name}={self.word(content)}")
        if isinstance(value, torch.jit.ScriptModule):
            words.append(f" code={value.code!r}")
        return "".join(words)

    def _class(self, kind: type) -> str:
        """A class: of a package its name and what was put into it, of one's own all its attributes and its bases."""
        package = self._package_of(kind)
        if package is not None:
            return f"class {_title(kind)} of {package}{self._patches(kind)}"
        words = [f"class {kind.__qualname__}"]
        words += [f" base {self.word(base)}" for base in kind.__bases__ if base is not object]
        words += [
            f" {name}={self.word(variable)}"
            for name, variable in sorted(vars(kind).items())
            if name not in _OF_EVERY_CLASS and not _is_cache(name)
        ]
        return "".join(words)

    def _package_of(self, kind: type) -> str | None:
        """The installed package, "timm 1.0", that a class comes from; None for one's own."""
        module = sys.modules.get(kind.__module__)
        file = getattr(module, "__file__", None)
        if file is not None:
            return _installed(file)
        known = (
            kind.__module__ in sys.builtin_module_names or kind.__module__.partition(".")[0] in sys.stdlib_module_names
        )
        return "python" if known and kind.__module__ != "__main__" else None

    def _patches(self, kind: type) -> str:
        """One's own functions in place of methods of a package's class or its bases, or of functions of their files."""
        patches = []
        for item in kind.__mro__:
            module = sys.modules.get(item.__module__)
            beside = (
                vars(module)
                if module is not None and item.__module__.partition(".")[0] not in ("builtins", "torch")
                else {}
            )
            for space in (vars(item), beside):
                for name, value in list(space.items()):
                    if (
                        isinstance(value, types.FunctionType)
                        and self._package_of(item)
                        and _is_own(value.__code__.co_filename)
                    ):
                        patches.append((name, value))
        return "".join(f" {name}={self.word(value)}" for name, value in sorted(patches, key=lambda pair: pair[0]))

    def _function(self, function: types.FunctionType) -> str:
        code = function.__code__
        origin = self._origin(code.co_filename)
        words = [f"function {function.__qualname__}"]
        words += [f" of {origin} line {code.co_firstlineno}"] if origin else []
        if not origin or "<lambda>" in function.__qualname__:  # of which a line may hold several
            words.append(f" {self._bytecode(code)}")
        values = {"defaults": function.__defaults__, "kwdefaults": function.__kwdefaults__, **_closure(function)}
        if hasattr(function, "__wrapped__"):
            values["wrapped"] = function.__wrapped__
        words += [f" {name}={self.word(item)}" for name, item in values.items() if item is not None]
        if _installed(code.co_filename) is None:
            words += [f" {name}={self.word(item)}" for name, item in _globals(function)]
        return "".join(words)

    def _origin(self, filename: str) -> str:
        """Where code comes from, and its file's content noted; "" where it has none."""
        package = _installed(filename)
        if package is not None:
            return package
        content = _file_digest(filename)
        if content is None:
            return ""
        self._files.add(f"file {content}")
        return f"file {content}"

    def _bytecode(self, code: types.CodeType) -> str:
        constants = [
            self._bytecode(co_const) if isinstance(co_const, types.CodeType) else self.word(co_const)
            for co_const in code.co_consts
        ]
        return (
            f"bytecode {code.co_name} {code.co_code.hex()} {constants} {code.co_names} {code.co_varnames} "
            f"{code.co_freevars}"
        )


def _is_cache(name: str) -> bool:
    """Whether an attribute is what somebody keeps for later: transformers writes such into the classes that derive from
    its own.
    """
    return name.startswith("_") and "cache" in name


def _title(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _closure(function: types.FunctionType) -> dict[str, Any]:
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            if name != "__class__":
                values[name] = cell.cell_contents
    return values


def _globals(function: types.FunctionType) -> list[tuple[str, Any]]:
    """The globals that a function reads, and of one's own modules the attributes that it reads."""
    names = sorted(_names(function.__code__))
    result = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    for module in [item for _, item in result if isinstance(item, types.ModuleType)]:
        if _is_own(getattr(module, "__file__", None) or ""):
            result += [(f"{module.__name__}.{name}", vars(module)[name]) for name in names if name in vars(module)]
    return result


def _names(code: types.CodeType) -> set[str]:
    """What code reads by name, the functions inside it included."""
    own = {
        get_instruction.argval
        for get_instruction in dis.get_instructions(code)
        if get_instruction.opcode in dis.hasname
    }
    return own.union(*(_names(co_const) for co_const in code.co_consts if isinstance(co_const, types.CodeType)))


def _is_own(filename: str) -> bool:
    return _installed(filename) is None and _file_digest(filename) is not None


@functools.cache
def _installed(filename: str) -> str | None:
    """ "timm 1.0.31" for a file of an installed package, "python" for one of Python's own; None for any other."""
    if filename.startswith("<frozen "):
        return "python"
    packages = re.split(r"[/\\](?:site|dist)-packages[/\\]", filename)
    if len(packages) > 1:
        top = re.split(r"[/\\.]", packages[-1])[0]
        version = _version(top)
        return None if version is None else f"{top} {version}"
    library = sysconfig.get_paths()["stdlib"]
    return "python" if os.path.realpath(filename).startswith(os.path.realpath(library) + os.sep) else None


@functools.cache
def _version(top: str) -> str | None:
    names = [top]
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(top)
    names = metadata.packages_distributions().get(top, [])
    return metadata.version(names[0]) if names else None


def _file_digest(filename: str) -> str | None:
    """sha256 of a source file as it is now, whatever ends its lines; None where there is no such file."""
    try:
        return hashlib.sha256(Path(filename).read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    except (OSError, ValueError):
        return None
