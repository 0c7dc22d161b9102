"""The CPU's runs of one case on one set of inputs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.case import Case
from harness.devices import Device
from harness.errors import CaseError, RunError
from harness.measure import RUNS
from harness.numerics.expected_error import Rules
from harness.reference import (
    BUFFER,
    Drawn,
    Draws,
    Models,
    Reference,
    move,
    moved_by_one_rounding,
    named_tensors,
    refer,
    seeded,
    weights_digest,
)
from harness.reference.isolated_process import CleanProcess, needs_clean
from harness.reference.store import Key, code_digest, key_of


def inputs_of(case: Case, seed: int | None) -> Any:
    """The inputs of a seed on the CPU, in the case's dtype; generators that `inputs` draws from besides its own are
    seeded too.

    Raises: CaseError where `inputs` cannot be called with a generator.
    """
    number = 0 if seed is None else seed
    generator = torch.Generator().manual_seed(number)
    _require_call(case, generator)
    with seeded(number):
        return move(case.inputs(generator), device="cpu", dtype=case.torch_dtype)


def _require_call(case: Case, generator: torch.Generator) -> None:
    try:
        inspect.signature(case.inputs).bind(generator)
    except TypeError as error:
        raise CaseError(
            f"{case.name}: inputs is called with one argument, a torch.Generator, and does not take it ({error}); "
            "write inputs=lambda generator: torch.randn(…, generator=generator)"
        ) from None
    except ValueError:  # of code without a signature
        return


class ModelDraws(Exception):
    """A run drew random numbers, and those before it were not made to draw the same."""


class CpuSide:
    """The CPU's runs of one case on one set of inputs: read from the store where they are, in a process without
    torch_npu where they must.
    """

    def __init__(self, case: Case, models: Models, inputs: Any, inputs_sha256: str, device: Device, seed: int):
        self.case, self.models, self.inputs, self.inputs_sha256, self.seed = case, models, inputs, inputs_sha256, seed
        self.stored: list[str] = []  # the roles that were read
        self.drawn = Drawn()  # what the last run drew
        self.base = models.base(**case.recipe)
        _require_dtype(case, self.base)
        wanted = case.isolated if case.isolated is not None else needs_clean(self.base)
        self.clean = wanted and device.torch_device.type == "npu"
        host = dict(separate=self.clean, emulated=device.backend == "emulated")
        self.layers = models.make_room(case.name, case.key, dtype=case.torch_dtype, **host)

    @property
    def draws(self) -> Draws:
        """How every side draws its random numbers."""
        alike = not self.case.own_random and self.models.draws.get(
            self.case.subject, True
        )  # unknown: the first run tells
        return Draws(seed=self.seed, dtype=self.case.torch_dtype, alike=alike)

    @property
    def is_first(self) -> bool:
        """Whether no reference of this model in this dtype was repeated yet."""
        return self.repeated not in self.models.repeats

    @property
    def repeated(self) -> tuple:
        """What the second run of a reference is remembered by."""
        return (*self.case.subject, self.case.dtype)

    @property
    def buffers(self) -> frozenset[str] | None:
        """The buffers that are outputs, as `watching` takes them."""
        return self.models.buffers.get(self.case.subject) if self.case.training else frozenset()

    def run(self, role: str, *, rules: Rules | None = None, stored: bool = True, twice: bool = False) -> Reference:
        """One run of the CPU's side. `role`: "cpu", "forecast", "golden", or "moved" for golden on moved inputs.

        Raises: ModelDraws when it drew random numbers and it was not known that the model draws.
        """
        uses_store = (
            stored
            and self.models.store is not None
            and not (self.case.subject in self.models.draws and self.draws.alike)
        )
        key = self._key(role, rules) if uses_store else None
        result = self.models.store.load(key) if key is not None else None
        if result is not None:
            self.stored.append(role)
            self.models.draws.setdefault(self.case.subject, False)  # what draws is not stored
            self.models.buffers.setdefault(self.case.subject, named_tensors(result, (BUFFER,)))
            return Reference(
                outputs=result,
                milliseconds=0.0,
                words=f"CPU {self.case.dtype}, read from the reference store",
                drawn=Drawn(),
            )
        ran = self._compute(role, rules, twice)
        self._note(ran)
        if key is not None and not ran.drawn.any and not ran.autocast and ran.again is None:
            self.models.store.save(key, ran.outputs)
        return ran

    def at_random(self, rules: Rules | None) -> list[dict[str, Tensor]]:
        """The outputs of `RUNS` runs under the device's rounding rules, or the CPU's own, with random roundings."""
        rules = rules if rules is not None else Rules(overflow_alone=True)
        return [self.run("random", rules=replace(rules, random=seed), stored=False).outputs for seed in range(RUNS)]

    def _note(self, ran: Reference) -> None:
        """Remember whether the model draws, from the runs that show it."""
        known = self.models.draws.get(self.case.subject)
        self.drawn = ran.drawn
        self.models.buffers.setdefault(self.case.subject, named_tensors(ran.outputs, (BUFFER,)))
        if known is None or (ran.drawn.any and not known):
            self.models.draws[self.case.subject] = ran.drawn.any
        if ran.drawn.any and known is False and not self.case.own_random:
            raise ModelDraws

    def _compute(self, role: str, rules: Rules | None, twice: bool) -> Reference:
        case, wide = self.case, role in ("golden", "moved")
        dtype = torch.float64 if wide else case.torch_dtype
        inputs = move(self.inputs, device="cpu", dtype=dtype)
        inputs = moved_by_one_rounding(inputs, case.torch_dtype) if role == "moved" else inputs
        how = dict(what=f"{case.name}: the model", draws=self.draws, twice=twice, buffers=self.buffers)
        how |= dict(forward=case.forward, dtype=dtype, rules=rules, gradients=case.gradients)
        how |= dict(pinned=case.subject in self.models.pinned)
        if self.clean:
            self.models.clean = self.models.clean or CleanProcess()
            cast = None if case.takes_dtype else case.torch_dtype
            result = self.models.clean.forward(self.base, inputs, cast=cast, wide=wide, layers=self.layers, **how)
        else:
            result = refer(lambda: copy_of(self.models, case, "cpu", wide=wide), inputs, **how)
        require_fractions(case, result.outputs, "the model")
        return result

    def _key(self, role: str, rules: Rules | None) -> Key:
        case, models = self.case, self.models
        of_model = ("content", *self.case.subject, case.dtype)
        if of_model not in models.digests:
            narrow = models.get(**case.built, device=torch.device("cpu"))
            models.digests[of_model] = weights_digest(narrow), code_digest(narrow, case.forward)
            if self.clean:  # the other process has a copy of its own
                models.drop(dtype=case.torch_dtype, device=torch.device("cpu"))
        weights, code = models.digests[of_model]
        more = {"rules": None if rules is None else _stated(rules), "clean": self.clean}
        more |= {"mode": [case.training, case.gradients, *(["buffers"] if case.training else [])]}
        if role in ("golden", "moved"):
            more |= {"requests": "as they are" if case.subject in models.pinned else "wide"}
        more |= {
            "cpu": "any",
            "torch": torch.__version__.partition("+")[0],
        }  # a store is carried from machine to machine
        return key_of(role=role, weights=weights, code=code, inputs=self.inputs_sha256, dtype=case.dtype, **more)


def _stated(rules: Rules) -> dict[str, Any]:
    """The rules as a store's key takes them: a vector unit that computes as `numerics` says is not spoken of, nor the
    lack of random roundings.
    """
    stated = asdict(rules)
    if rules.random is None:
        del stated["random"]
    if not rules.vector.operators:
        del stated["vector"]
    return stated


def without_npu(case: Case, models: Models, inputs: Any, device: Device, seed: int | None) -> dict[str, Tensor] | None:
    """What the CPU gives in a process without torch_npu, by name; None for a model that gives the same beside it.
    `inputs` are on the CPU, in the case's dtype.
    """
    cpu = CpuSide(case, models, inputs, "", device, seed or 0)
    return cpu.run("cpu", stored=False).outputs if cpu.clean else None


def golden_outputs(cpu: CpuSide) -> tuple[dict[str, Tensor] | None, str | None]:
    """The outputs in float64, or None and why there are none: a model may hold operators that have no float64."""
    try:
        return cpu.run("golden").outputs, None
    except RunError as error:
        first = str(error)
    if cpu.case.subject not in cpu.models.pinned:  # it may want the float32 that it asks for
        cpu.models.pinned[cpu.case.subject] = first
        try:
            return cpu.run("golden").outputs, None
        except RunError:
            cpu.models.pinned.pop(cpu.case.subject)
    cpu.models.draws.setdefault(cpu.case.subject, False)
    return None, first


def copy_of(
    models: Models, case: Case, device: torch.device | str, *, wide: bool = False
) -> contextlib.AbstractContextManager[nn.Module]:
    """Lends a copy of a case's model in its dtype on a device, to be run; `wide` gives those weights in float64."""
    return models.untouched(**case.built, device=torch.device(device), wide=wide)


def require_fractions(case: Case, result: Mapping[str, Tensor], what: str) -> None:
    """Raises: CaseError when none of the tensors that a model returned is floating point."""
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in result.values()):
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in result.values()}))
        raise CaseError(
            f"{case.name}: {what} returned only {dtypes}, in which no rounding error shows; "
            f"return the floating-point values that they come from, and name them in `decisions` to compare the choices"
        )


def _require_dtype(case: Case, model: nn.Module) -> None:
    """Refuse a builder that was given a dtype and heeds it nowhere: its rows would be those of another dtype.

    Raises: CaseError.
    """
    dtypes = {tensor.dtype for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()}
    if case.takes_dtype and dtypes and case.torch_dtype not in dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CaseError(
            f"{case.name}: model(dtype) was given {case.dtype} and returned a model that is {names} "
            "throughout; hand the"
            " dtype on, as in from_pretrained(DIR, dtype=dtype), or take no argument and the harness casts"
        )
