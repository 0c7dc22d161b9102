"""The CPU's side of models that compute otherwise where an NPU can be seen: a process of its own, in which there is no
torch_npu.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import io
import json
import marshal
import os
import pickle
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from harness import errors, torch_private
from harness.errors import CaseError, HarnessError, RunError
from harness.reference import Draws, Reference, copy_module, refer, untouched
from harness.reference.layers import layered
from harness.reference.mapped import FilePart, file_parts, mapped
from harness.reference.models import LARGE, is_in, keep_large_blocks, release_memory, release_where_tight
from harness.reference.untouched import versions

WHERE = "in the process without torch_npu"
PARENTS_MAIN = (
    "__parents_main__"  # what the child calls the parent's __main__, so that a guarded script does not run there
)
_QUIET = {"TRANSFORMERS_VERBOSITY": "error"}  # the device's side says what there is to say; a user's own value stays
_GRACE = 5  # seconds that a process is given to end by itself

# Nothing may be imported before torch_npu is taken away: transformers asks for it once, when it is imported.
_START = """
import sys
sys.modules["torch_npu"] = None
import json
sys.path[:] = json.loads(sys.argv[2])
from harness.reference.isolated_process import _serve
_serve(int(sys.argv[1]))
"""


_NAMES = re.compile(r"is_torch_npu_available|is_npu_available|npu|torch_npu|npu_\w+")  # of code that asks for an NPU
_NEEDS = re.compile(r"^(?:import|from) torch_npu\b", re.MULTILINE)  # it cannot be imported without torch_npu


def needs_clean(model: nn.Module) -> bool:
    """Whether the model's CPU results may depend on an NPU being there.

    - A part is transformers' own or derives from it. transformers 5.24, integrations/sdpa_attention.py: where
      is_torch_npu_available() says yes, every attention mask that is not boolean becomes `logical_not(mask.bool())`,
      also for tensors on the CPU. An additive mask loses its values, and a position bias becomes a mask that hides what
      it should favour. The answer is taken when transformers is imported and stays, so a reference that is free of it
      needs another process.
    - A method of one of its classes, or a function of the same module that a method calls, names an NPU, as diffusers'
      activations do (`is_torch_npu_available()`, `torch.npu`, `torch_npu.npu_geglu`), and every class of the model can
      be imported there.

    A model that only calls functions of such packages is not recognised: `Case(isolated=True)`.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    if any(kind.__module__.partition(".")[0] == "transformers" for kind in kinds):
        return True
    asks = any(_asks(kind) for kind in kinds)
    return asks and not any("<locals>" in kind.__qualname__ or _needs_npu(kind.__module__) for kind in kinds)


_NEVER = ("torch", "torch_npu", "builtins", "typing", "abc")  # packages whose classes are the same in both processes


@functools.cache
def _asks(kind: type) -> bool:
    """Whether a class's own methods, or functions of its module that they call, name an NPU."""
    module = vars(sys.modules.get(kind.__module__, types))
    if kind.__module__.partition(".")[0] in _NEVER:
        return False
    todo = [item for value in vars(kind).values() for item in _codes_of(value)]
    seen = set()
    while todo:
        code = todo.pop()
        if code in seen:
            continue
        seen.add(code)
        if any(_NAMES.fullmatch(name) for name in code.co_names):
            return True
        todo += [co_const for co_const in code.co_consts if isinstance(co_const, types.CodeType)]
        called = [module.get(name) for name in code.co_names]
        todo += [
            item
            for value in called
            if getattr(value, "__module__", None) == kind.__module__
            for item in _codes_of(value)
        ]
    return False


def _codes_of(value: Any) -> list[types.CodeType]:
    """The code of a function, a method, a property or what a decorator wraps."""
    value = getattr(value, "__func__", value)
    parts = [value.fget] if isinstance(value, property) else [value, getattr(value, "__wrapped__", None)]
    return [part.__code__ for part in parts if isinstance(part, types.FunctionType)]


@functools.cache
def _needs_npu(name: str) -> bool:
    """Whether a module imports torch_npu where it begins, so that it cannot be imported where there is none."""
    try:
        source = Path(sys.modules[name].__file__).read_text(encoding="utf-8")
    except (KeyError, AttributeError, TypeError, OSError, UnicodeDecodeError):
        return False
    return bool(_NEEDS.search(source))


_Number = tuple[int, Any]  # a model's id here and the dtype in which it was sent


class CleanProcess:
    """A process without torch_npu and with this one's threads and settings. It starts with the first call and is kept.

    Starting costs what `import torch` costs, 1 to 2 s, and transformers' own import with the first model of it.
    `start()` returns at once, so that this time passes while the model is built. A model is sent once and kept there
    for as long as it lives here.

    What is sent is pickled: classes must be at the top level of a module; functions need not be. Modules are imported
    anew there, so a global that was changed after its module was imported is as before. The process ends with this
    object, with the interpreter, and when its pipe closes because this process was killed.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._owner = 0  # the process that started it: a fork must not talk into its parent's pipe
        self._end: weakref.finalize | None = None
        self._sent: dict[_Number, tuple[weakref.ref, Any]] = {}  # the model, and its state when it was sent

    def start(self) -> None:
        """Start the process unless it runs; it imports torch while this call returns.

        Raises: RunError when it cannot be started.
        """
        with self._lock:
            if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
                return
            if _serving:
                raise RunError(
                    f"another such process was asked for {WHERE}; put what a script runs under if __name__ == "
                    "'__main__':"
                )
            self.close()
            self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = _QUIET | os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "ASCEND_RT_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(_paths())]
        try:
            process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2
            )
        except OSError as error:
            ours.close()
            raise RunError(f"the process without torch_npu cannot be started: {error}") from error
        finally:
            theirs.close()
        self._process, self._socket, self._owner = process, ours, os.getpid()
        self._end = weakref.finalize(self, _end, process, ours, self._owner)

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            if self._end is not None:
                self._end()
            self._process = self._socket = self._end = None
            self._sent = {}

    @property
    def pid(self) -> int | None:
        """The process's number while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def run(self, function: Callable, *args: Any) -> Any:
        """What `function(*args)` returns there, with its tensors on the CPU.

        Raises: CaseError when something cannot be sent; what the harness raised there; RunError for anything else that
        was raised there, with its type and text, and when the process died.
        """
        with self._lock:
            self.start()
            try:
                answer = self._exchange((function, args, _settings()))
            except (OSError, EOFError) as error:
                raise RunError(f"the process without torch_npu {self._death()}; the next run starts another") from error
            except HarnessError:
                raise
            except BaseException:  # an interrupt in between: what comes next on the pipe would answer the last question
                self.close()
                raise
        if answer[0] == "returned":
            return answer[1]
        _, kind, text, trace = answer
        raise getattr(errors, kind, RunError)(text) from _Remote(trace)

    def forward(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        what: str = "the model",
        cast: torch.dtype | None = None,
        wide: bool = False,
        layers: bool = False,
        draws: Draws | None = None,
        twice: bool = False,
        **how: Any,
    ) -> Reference:
        """`refer(…, inputs, draws=draws, twice=twice, **how)` there, on copies of the model that is there.

        With `cast` the model is sent in that dtype, and this process keeps no copy of it. `wide` runs those weights in
        float64, in a copy that is made there: one that casts layer by layer with `layers`, else a whole one.

        Raises: as `run`; CaseError when `what` returned something that is no tensor.
        """
        with self._lock:
            self.start()
            number = self._number_of(model, cast)
            draws = draws or Draws(seed=0, dtype=how["dtype"], alike=False)
            result, written = self.run(
                _forward, number, inputs, wide, layers, dict(what=what, draws=draws, twice=twice) | how
            )
            if written:  # the weights there are no more those that are here
                self._forget([number])
            return result

    def forget_gone(self) -> None:
        """Have the process free the models that are no more here."""
        with self._lock:
            if self._sent and self.pid is not None:
                self._forget([number for number, (alive, _) in self._sent.items() if alive() is None])

    def _forget(self, gone: list[_Number]) -> None:
        if gone:
            self.run(_forget, gone)
            self._sent = {name: entry for name, entry in self._sent.items() if name not in gone}

    def _number_of(self, model: nn.Module, cast: torch.dtype | None) -> _Number:
        """The number of the model there, after it was sent if it is new or changed."""
        number, state = (id(model), cast), _state(model)
        gone = [number for number, (alive, _) in self._sent.items() if alive() is None]
        gone += [item for item in self._sent if item[0] == number[0] and item[1] != cast and item not in gone]
        if number not in gone and number in self._sent and self._sent[number][1] != state:
            gone.append(number)
        self._forget(gone)  # first: the old one and the new one may not fit together
        if number not in self._sent:
            self.run(_keep, number, _in(model, cast))
            self._sent[number] = (weakref.ref(model), state)
        return number

    def _exchange(self, message: Any) -> Any:
        _send(self._socket, _pack(message, "the model, its inputs or its forward"))
        return _unpack(_receive(self._socket))

    def _death(self) -> str:
        """How the process ended, in words; after it did."""
        process = self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        status = process.poll()
        self.close()
        if status is None:
            return "closed its pipe"
        if status >= 0:
            return f"ended with exit status {status}; standard error has its words"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return f"died of {name}" + ("; the system may have run out of memory" if name == "SIGKILL" else "")


class _Remote(Exception):
    """The other process's traceback, as the cause of what is raised here."""

    def __init__(self, trace: str):
        super().__init__(f"\n{trace}")


def _end(process: subprocess.Popen, connection: socket.socket, owner: int) -> None:
    connection.close()
    if owner != os.getpid():
        return
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _paths() -> list[str]:
    """sys.path, with the folder of this package for a child that would not find it otherwise."""
    return [os.path.abspath(item) for item in [*sys.path, str(Path(__file__).parents[1])]]


def _state(model: nn.Module) -> tuple:
    """What changes when a parameter or buffer is replaced or written into."""
    tensors = [*model.parameters(), *model.buffers()]
    return model.training, tuple((id(tensor), None if tensor.is_inference() else tensor._version) for tensor in tensors)


def _in(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """`model`, or a copy of it in `dtype` where it is in another."""
    if dtype is None or is_in(model, dtype):
        return model
    return copy_module(model, dtype=dtype, device=torch.device("cpu"))


def _settings() -> dict[str, Any]:
    """What changes a CPU's numbers beside the model and the inputs."""
    return dict(
        threads=torch.get_num_threads(),
        dtype=torch.get_default_dtype(),
        products=torch.get_float32_matmul_precision(),
        deterministic=(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        mkldnn=torch_private.mkldnn_enabled(),
        random=torch.default_generator.get_state(),
    )


# -------- what is sent, and how


def _pack(value: Any, what: str) -> list:
    """`value` as one header and the memory of its tensors, which is not copied. `what` is its name in an error. What
    lies in a file that is mapped into memory is not sent: the other side maps the file.

    Raises: CaseError when it cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    try:
        pickler.dump(value)
    except CaseError:
        raise
    except Exception as error:
        raise CaseError(
            f"{what} cannot be pickled for the process without torch_npu: {error}; "
            "define every class at the top level of a module, and keep files, locks and generators out"
        ) from error
    parts = file_parts(pickler.storages)
    where = [storage.nbytes() if part is None else part for storage, part in zip(pickler.storages, parts)]
    memory = [_memory(storage) for storage, part in zip(pickler.storages, parts) if part is None]
    return [pickle.dumps((_paths(), pickler.homes, where, stream.getvalue())), *memory]


def _memory(storage: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def _send(connection: socket.socket, packed: list) -> None:
    connection.sendall(struct.pack("!Q", len(packed[0])))
    for item in packed:
        connection.sendall(item)


def _receive(connection: socket.socket) -> tuple:
    """What the other side packed. Raises: EOFError when its end is closed."""
    (length,) = struct.unpack("!Q", _fill(connection, bytearray(8)))
    paths, homes, where, stream = pickle.loads(_fill(connection, bytearray(length)))
    storages: list[torch.UntypedStorage | FilePart] = []
    for item in where:
        if isinstance(item, FilePart):
            storages.append(item)
            continue
        storages.append(torch.UntypedStorage(item))
        _fill(connection, _memory(storages[-1]))
    return paths, homes, storages, stream


def _fill(connection: socket.socket, buffer):
    view = memoryview(buffer)
    while view.nbytes:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the pipe was closed")
        view = view[count:]
    return buffer


def _unpack(received: tuple) -> Any:
    paths, homes, storages, stream = received
    files: dict[str, torch.UntypedStorage] = {}
    storages = [mapped(item, files) if isinstance(item, FilePart) else item for item in storages]
    if _serving:
        sys.path[:] = paths
        _homes.update(homes)
    return _Unpickler(io.BytesIO(stream), storages).load()


class _Pickler(pickle.Pickler):
    """Leaves the memory of tensors out, notes where classes and functions are defined, and takes functions that no name
    leads to.
    """

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, protocol=5)
        self.storages: list[torch.UntypedStorage] = []
        self.homes: dict[str, tuple[str, str | None]] = {}  # module: the name to import it by, and its file
        self._positions: dict[int, int] = {}  # by storage: tensors that share memory share it there too

    def persistent_id(self, value):
        typed = isinstance(value, torch.storage.TypedStorage)
        if not typed and not isinstance(value, torch.UntypedStorage):
            return None
        storage = value._untyped_storage if typed else value
        if storage.device.type != "cpu":
            raise CaseError(
                f"a tensor on {storage.device} cannot be sent to the process without torch_npu; give it one on the CPU"
            )
        if storage._cdata not in self._positions:
            self._positions[storage._cdata] = len(self.storages)
            self.storages.append(storage)
        return self._positions[storage._cdata], value.dtype if typed else None

    def reducer_override(self, value):
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            base = parametrize.type_before_parametrizations(value)
            self._note(base.__module__)
            return _blank, (base,), value.__dict__, None, None, _parametrized
        if isinstance(value, types.FunctionType) and not _is_importable(value):
            return _function, self._parts(value)
        if isinstance(value, (type, types.FunctionType)):
            self._note(value.__module__)
        return NotImplemented

    def _note(self, name: str) -> None:
        if name in self.homes or name not in sys.modules:
            return
        module = sys.modules[name]
        file = getattr(module, "__file__", None)
        spec = getattr(module, "__spec__", None)
        if name != "__main__":
            self.homes[name] = (name, file)
        elif file is not None:
            self.homes[name] = (PARENTS_MAIN if spec is None else spec.name, os.path.abspath(file))
        else:
            raise CaseError(
                "what a program without a file defines, as a notebook does, cannot be sent to another process; "
                "put it into a module"
            )

    def _parts(self, function: types.FunctionType) -> tuple:
        """A lambda, or a function inside a function: the module in which it looks names up, its code, and what it
        closes over.
        """
        home = function.__globals__.get("__name__")
        if home not in sys.modules or vars(sys.modules[home]) is not function.__globals__:
            raise CaseError(f"the function {function.__qualname__} is of no module; define it at the top level of one")
        self._note(home)
        closure = None if function.__closure__ is None else tuple(cell.cell_contents for cell in function.__closure__)
        return (
            home,
            marshal.dumps(function.__code__),
            function.__qualname__,
            function.__defaults__,
            function.__kwdefaults__,
            closure,
        )


def _is_importable(function: types.FunctionType) -> bool:
    result = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        result = getattr(result, part, None)
    return result is function


def _function(
    home: str, code: bytes, name: str, defaults: tuple | None, keywords: dict | None, closure: tuple | None
) -> types.FunctionType:
    code = marshal.loads(code)
    cells = None if closure is None else tuple(types.CellType(item) for item in closure)
    made = types.FunctionType(code, vars(_home(home)), code.co_name, defaults, cells)
    made.__qualname__, made.__kwdefaults__ = name, keywords
    return made


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, storages: list[torch.UntypedStorage]):
        super().__init__(stream)
        self._storages = storages

    def persistent_load(self, name):
        index, dtype = name
        storage = self._storages[index]
        return (
            storage if dtype is None else torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        )

    def find_class(self, module, name):
        result = _home(module)
        for part in name.split("."):
            if not hasattr(result, part):
                raise CaseError(
                    f"{module} has no {name} when it is imported anew; define it at the top level of a module, "
                    "without a condition"
                )
            result = getattr(result, part)
        return result


# -------- modules, by name or by file

_homes: dict[str, tuple[str, str | None]] = {}  # there: how the parent's modules are found


def _home(module: str) -> types.ModuleType:
    """The module of that name on the other side: imported where that finds the same file, else loaded from it.

    pytest imports test files under names that nothing else can import.
    """
    if not _serving:
        return importlib.import_module("__main__" if module == PARENTS_MAIN else module)
    name, file = _homes.get(module, (module, None))
    known = sys.modules.get(name)
    if known is not None and (file is None or _same(getattr(known, "__file__", None), file)):
        return known
    return importlib.import_module(name) if file is None or _same(_finds(name), file) else _load(name, file)


def _finds(name: str) -> str | None:
    """The file that `import name` would take."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None
    return None if spec is None else spec.origin


def _same(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)


def _load(name: str, file: str) -> types.ModuleType:
    path = Path(file).parent if Path(file).stem == "__init__" else Path(file)
    parts = name.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        if package not in sys.modules and _finds(package) is None:
            with contextlib.suppress(ImportError):
                importlib.import_module(package)  # a namespace package has no file
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path.parents[len(parts) - 1 - count])]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# -------- the other side

_serving = False
_models: dict[_Number, nn.Module] = {}  # as they were sent: only copies of them run
_wide: dict[_Number, nn.Module] = {}  # their whole float64 copies
_writing: set[_Number] = set()  # those that write into their parameters while they run


def _serve(number: int) -> None:
    """Answer what comes on a socket until its other end is closed."""
    global _serving
    _serving = True
    keep_large_blocks()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it goes to the whole group; the parent decides
    connection = socket.socket(fileno=number)
    threading.Thread(target=_leave_when_closed, args=(number,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            _send(connection, _answer(_receive(connection)))


def _leave_when_closed(number: int) -> None:
    """End in the midst of a forward too, when nobody is left to read it."""
    waiting = select.poll()
    waiting.register(number, 0)  # a hang-up is always told
    waiting.poll()
    os._exit(0)


def _answer(received: tuple) -> list:
    try:
        function, args, settings = _unpack(received)
        _adopt(**settings)
        return _pack(("returned", function(*args)), "what was returned")
    except HarnessError as error:
        return _raised(error, type(error).__name__, str(error))
    except BaseException as error:  # noqa: BLE001  a model may call sys.exit
        advice = (
            "; import it inside the function that needs it"
            if isinstance(error, ImportError) and error.name == "torch_npu"
            else ""
        )
        return _raised(error, "RunError", f"{WHERE}: {type(error).__name__}: {error}{advice}")


def _raised(error: BaseException, kind: str, text: str) -> list:
    return _pack(("raised", kind, text, "".join(traceback.format_exception(error))), "an error")


def _adopt(
    *, threads: int, dtype: torch.dtype, products: str, deterministic: tuple[bool, bool], mkldnn: bool, random: Tensor
) -> None:
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(products)
    torch_private.set_deterministic(deterministic[0], warn_only=deterministic[1])
    torch_private.set_mkldnn_enabled(mkldnn)
    torch.default_generator.set_state(random)


def _keep(number: _Number, model: nn.Module) -> None:
    _register(model)
    _models[number] = model


def _widen(number: _Number) -> nn.Module:
    """The whole float64 copy of a model that is here."""
    if number not in _wide:
        _wide[number] = copy_module(_models[number], dtype=torch.float64, device=torch.device("cpu"))
    return _wide[number]


def _register(model: nn.Module) -> None:
    """Tell transformers which outputs its models can record: it notes them when one is built, and this one was
    unpickled.
    """
    known = sys.modules.get("transformers.utils.output_capturing")
    registry = getattr(known, "_CAN_RECORD_REGISTRY", None)
    if registry is not None:
        for module in model.modules():
            if hasattr(module, "_can_record_outputs"):
                registry[module] = module._can_record_outputs


def _blank(base: type) -> nn.Module:
    return base.__new__(base)


def _parametrized(module: nn.Module, state: dict[str, Any]) -> None:
    """Make a module with parametrized tensors, as of weight_norm, from its base class and its state: its own class was
    made at run time.
    """
    module.__dict__.update(state)
    torch_private.adopt_parametrized(module)


def _forget(numbers: list[_Number]) -> None:
    gone = [_models.pop(number) for number in numbers if number in _models]
    large = sum(parameter.nbytes for model in gone for parameter in model.parameters()) > LARGE
    for number in numbers:
        _wide.pop(number, None)
    del gone
    if large:
        release_memory()


def _forward(number: _Number, inputs: Any, wide: bool, layers: bool, how: dict[str, Any]) -> tuple[Reference, bool]:
    """What a copy of a model gives, and whether it wrote into the weights that it shares with the model."""
    there = torch.device("cpu")
    source = _widen(number) if wide and not layers else _models[number]
    before = versions(source)

    @contextlib.contextmanager
    def lend() -> Iterator[nn.Module]:
        if wide and layers:
            model = layered(source)
        else:
            model = copy_module(source, dtype=None, device=there) if number in _writing else untouched(source)
        _register(model)
        yield model

    result = refer(lend, inputs, **how)
    written = versions(source) != before
    if written:
        _writing.add(number)
    outputs = {name: _alone(tensor) for name, tensor in result.outputs.items()}
    again = None if result.again is None else {name: _alone(tensor) for name, tensor in result.again.items()}
    release_where_tight()  # the device's copy of the model may come next
    return replace(result, outputs=outputs, again=again, words=f"{result.words}, {WHERE}"), written


def _alone(tensor: Tensor) -> Tensor:
    """A tensor without the rest of the memory that it is a view of."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
