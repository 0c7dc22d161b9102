"""What the emulated CANN does not do besides operators, refused in words where a program asks torch_npu for it.

Without this torch_npu would name a C function that it did not find, write an empty profile, or raise an OSError
without a text. `refuse` replaces the functions of torch_npu that are asked first by ones that say it. A function that
a release of torch_npu does not have is passed over.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, NoReturn


class NotEmulated(NotImplementedError, AttributeError):
    """Asked of torch_npu over the emulated CANN, which does not do it.

    An AttributeError too, so that `hasattr` on a lazy module answers False.
    """


GRAPHS = (
    "graphs (torch.npu.NPUGraph, torch.npu.graph) are not emulated; run the model without graph capture, in eager mode"
)
PROFILER = (
    "the profiler (torch_npu.profiler) is not emulated: there is no device whose time it could measure; "
    "leave it out of this run"
)
HISTORY = (
    "the memory history (torch.npu.memory._record_memory_history) is not emulated; "
    "torch.npu.memory_allocated and max_memory_allocated are"
)
ATB = (
    "operators of ATB (the NNAL package, such as torch_npu._npu_paged_attention) are not emulated; "
    "use the torch_npu.npu_* operators"
)
COMPILE = (
    'torch.compile for the NPU (backend="npu", "npugraph_ex", torchair) is not emulated; run the model in eager mode'
)
COLLECTIVES = (
    "collectives on the NPU (backend hccl or lccl, also as the default of init_process_group) are not emulated; "
    'init_process_group("gloo") does those of CPU tensors'
)

ENTRIES = (  # the module, the class or function in it, and what to say
    ("torch_npu.npu.graphs", "NPUGraph.__new__", GRAPHS),
    ("torch_npu.profiler.profiler", "_KinetoProfile.__init__", PROFILER),
    ("torch_npu.profiler.profiler", "profile.__init__", PROFILER),
    ("torch_npu.dynamo", "_get_global_npu_backend", COMPILE),
    ("torch_npu.dynamo", "_exec", COMPILE),
    ("torch_npu.dynamo", "_LazyTorchair.__getattr__", COMPILE),
    ("torch_npu.dynamo", "_LazyNpuGraphEx.__getattr__", COMPILE),
    ("torch_npu", "_new_process_group_hccl_helper", COLLECTIVES),
    ("torch_npu", "_new_process_group_lccl_helper", COLLECTIVES),
    ("torch_npu._init.registry.distributed", "_new_process_group_hccl_helper", COLLECTIVES),
    ("torch_npu._init.registry.distributed", "_new_process_group_lccl_helper", COLLECTIVES),
)


def refuse() -> None:
    """Replace the entries; torch_npu must be imported."""
    for module, path, text in ENTRIES:
        holder = _module(module)
        *parents, name = path.split(".")
        for parent in parents:
            holder = getattr(holder, parent, None)
        if holder is not None and name in vars(holder):
            setattr(holder, name, _refusing(text))
    _refuse_history(_module("torch_npu.npu.memory"))
    atb = _module("torch_npu.op_plugin.atb._atb_ops")
    if getattr(atb, "NNAL_EX", None) is not None:  # what the operators of ATB raise
        atb.NNAL_EX, atb.GLOBAL_E = NotEmulated(ATB), None


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return sys.modules.get(name)


def _refusing(text: str):
    def refused(*arguments: Any, **options: Any) -> NoReturn:
        raise NotEmulated(text)

    return refused


def _refuse_history(memory: Any) -> None:
    """Switching it off is no request, so that stays."""
    record = getattr(memory, "_record_memory_history", None)
    if record is None:
        return

    def refused(enabled: Any = "all", *arguments: Any, **options: Any) -> Any:
        if enabled is None:
            return record(None, *arguments, **options)
        raise NotEmulated(HISTORY)

    memory._record_memory_history = refused
