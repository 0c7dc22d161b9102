"""What torch_npu and CANN say when a device fails: the vendor's texts and codes, what they mean, and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass

RESET = "use another card, or reset this one (npu-smi set -t reset -i CARD -c CHIP ends every process on it) and rerun"
AGAIN = "run the rows that are left in another process, without the row that stopped it"
HEALTH = "npu-smi info -t health -i CARD"


@dataclass(frozen=True, kw_only=True)
class DeviceFault:
    """One kind of failure of a device.

    `codes` are acl's (rt_error_codes.h of CANN), `texts` what torch_npu (NPUQueue.cpp, NPUException.cpp,
    NPUCachingAllocator.cpp) and CANN's runtime write. `lasts`: another process on the same card may meet it again.
    """

    name: str
    meaning: str
    advice: str
    codes: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    lasts: bool = False

    @property
    def sentence(self) -> str:
        """The name, what it means and what to do, on one line."""
        return f"{self.name}: {self.meaning}; {self.advice}"


FAULTS = (  # the gravest first: CANN often reports the consequences of a fault beside the fault
    DeviceFault(
        name="HBM MULTI BIT ECC ERROR",
        meaning="several bits of the card's memory flipped, which ECC cannot correct: no number of this card counts",
        advice=f"{RESET}; npu-smi info -t ecc -i CARD counts such errors",
        codes=(507054,), texts=("HBM MULTI BIT ECC ERROR", "hbm Multi-bit ECC error"), lasts=True,
    ),
    DeviceFault(
        name="UCE ERROR",
        meaning="an error in the card's memory that the hardware could not correct: no number of this card counts",
        advice=f"{RESET}; npu-smi info -t ecc -i CARD counts such errors",
        codes=(507053,), texts=("UCE ERROR", "device mem error"), lasts=True,
    ),
    DeviceFault(
        name="SUSPECT MEM ERROR",
        meaning="the memory of this card or of one that it reads from may be damaged",
        advice=f"look at the other processes' errors and at {HEALTH}; {RESET}",
        codes=(507055,), texts=("SUSPECT MEM ERROR", "suspect device mem error"), lasts=True,
    ),
    DeviceFault(
        name="SUSPECT REMOTE ERROR",
        meaning="the memory of another card that this one reads from may be damaged, or an access went out of bounds",
        advice=f"look at the other processes' errors and at {HEALTH}; {RESET}",
        codes=(507057,), texts=("SUSPECT REMOTE ERROR", "suspect remote error"), lasts=True,
    ),
    DeviceFault(
        name="LINK ERROR",
        meaning="the link between two cards broke",
        advice=f"rerun; where it comes again check the link between the cards, or use one card alone ({HEALTH})",
        codes=(507056,), lasts=True,
        texts=("LINK ERROR", "reason=[link error]", "reason=link error", "network link error"),
    ),
    DeviceFault(
        name="HCCL OP RETRY FAILED",
        meaning="a collective operation between cards failed again after its retries",
        advice="look at the other processes' errors, then rerun",
        codes=(507904,), texts=("HCCL OP RETRY FAILED", "hccl op retry failed"),
    ),
    DeviceFault(
        name="FORCE STOP",
        meaning="something stopped what the device was doing, such as torch_npu.npu.stop_device or a watchdog",
        advice=AGAIN,
        codes=(107022, 107023, 107035), texts=("FORCE STOP", "device task abort"),
    ),
    DeviceFault(
        name="the device is lost",
        meaning="the driver no longer reaches the card",
        advice=f"{HEALTH} and dmesg say more; {RESET}",
        codes=(207004, 507010, 507013, 507033, 507899, 507901),
        texts=("ts lost heartbeat", "hdc disconnect"), lasts=True,
    ),
    DeviceFault(
        name="out of memory",
        meaning="the card has less free memory than was asked for",
        advice="use a smaller batch or shape, or a card that nobody else uses (npu-smi info names the processes on it)",
        codes=(207001, 207018), texts=("NPU out of memory", "EL0004", "Failed to allocate"),
    ),
    DeviceFault(
        name="AI Core exception",
        meaning="a kernel failed while it ran, often because it read or wrote out of bounds",
        advice=f"CANN's log (~/ascend/log) names the kernel; {AGAIN}",
        codes=(507015, 507016, 507035, 507036, 507042, 507043, 507044, 507045, 507049, 507050),
        texts=("aicore exception", "vector core exception", "core execution is abnormal"),
    ),
    DeviceFault(
        name="AI CPU exception",
        meaning="an operator that runs on the device's ARM cores failed",
        advice=f"CANN's log (~/ascend/log) names the operator; {AGAIN}",
        codes=(507018, 507900), texts=("aicpu exception", "aicpu execution is abnormal"),
    ),
    DeviceFault(
        name="timeout",
        meaning="a kernel did not end in the time that CANN gives it",
        advice=f"rerun on a card that nobody else uses; CANN's log (~/ascend/log) names a kernel that hangs; {AGAIN}",
        codes=(107019, 107020, 507012, 507014, 507017, 507034, 507046, 507047, 507048),
        texts=("execution times out", "execution timed out"),
    ),
)  # fmt: skip
_CODE = re.compile(
    r"(?:\bcode(?: is)?|\bresult|\bret|\bretcode)\s*[=:]?\s*(\d{6})\b", re.IGNORECASE
)  # not the process's number
QUEUED = re.compile(
    r"^The Inner error is reported as above\..*the current working operator name is (\w+)"
)  # NPUQueue.cpp
_LONGEST = 400  # characters of one line of the vendor's that are kept


def fault_in(text: str) -> DeviceFault | None:
    """The kind of failure that an error's text speaks of, the gravest where there are several; None for another text.

    >>> fault_in("NPU function error: AclrtSynchronizeDeviceWithTimeout, error code is 507015").name
    'AI Core exception'
    """
    codes = {int(item) for item in _CODE.findall(text)}
    return next(
        (fault for fault in FAULTS if codes & set(fault.codes) or any(item in text for item in fault.texts)), None
    )


def comes_late(text: str) -> bool:
    """Whether an error may be raised at a later call than that of the operator that failed.

    torch_npu's queue raises at a later call, and so does the device: a kernel runs after the call that launched it.
    Memory is asked for by the call itself.
    """
    fault = fault_in(text)
    queued = any(QUEUED.search(line.strip()) for line in text.splitlines())
    return queued or (fault is not None and fault.name != "out of memory")


def error_summary(error: BaseException) -> str:
    """An exception on one line: its type, its first line, and what CANN said, which torch_npu writes at the end."""
    lines = [line.strip()[:_LONGEST] for line in str(error).splitlines() if line.strip()] or [""]
    queued = QUEUED.search(lines[0])
    lines[0] = f"{queued[1]} failed in torch_npu's queue" if queued else lines[0]
    last = next(
        (line for line in lines[1:] if re.match(r"E[A-Z0-9]\d{4}\b", line) and "Inner Error!" not in line), lines[-1]
    )
    return f"{type(error).__name__}: {lines[0]}" + (f" … {last}" if len(lines) > 1 else "")
