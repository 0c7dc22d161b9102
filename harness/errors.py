"""The exceptions of the harness: what a command prints on one line, and what a test row gives as its reason.

HarnessError
├── DeviceError      the requested device cannot run
├── CheckpointError  a checkpoint, its config or its layout is not what it must be
├── CaseError        a case returned something that cannot be measured
├── MemoryLimitError a case needs more host memory than there is
├── RunError         a model raised while it ran
├── UnstableReferenceError  two runs on the CPU return other numbers
├── TorchError       the installed torch is older than the harness needs
└── CompilerError    a C source of the harness cannot be compiled here
"""


class HarnessError(Exception):
    """A step of the harness failed; the message says what was found, what was expected and what to do."""


class DeviceError(HarnessError):
    """The requested device cannot run here."""


class CheckpointError(HarnessError):
    """A checkpoint, its config or its layout is not what it must be."""


class CaseError(HarnessError):
    """A case returned something that cannot be measured."""


class MemoryLimitError(HarnessError):
    """A case needs more host memory than this machine, its container or this worker's share has left."""


class RunError(HarnessError):
    """A model raised while it ran; the exception that it raised is the cause of this one.

    `location`: the module, operator and line that raised, "blocks.3: gelu (vit.py:12)"; "" where that is not known.
    """

    def __init__(self, text: str, *, location: str = ""):
        super().__init__(text)
        self.location = location


class TorchError(HarnessError):
    """The installed torch is older than the harness needs, or there is none."""


class CompilerError(HarnessError):
    """A C source of the harness cannot be compiled here."""


class LossyReferenceError(HarnessError):
    """The CPU loses more in float32 products than float32 does, so it cannot be the reference of a device."""


class UnstableReferenceError(HarnessError):
    """Two runs of a case on the CPU return other numbers, so they cannot be the reference of a device."""
