"""What torch_npu and CANN say of a broken device is named, from their own texts; what is no such text is not."""

import pytest

from harness.devices.device_errors import AGAIN, FAULTS, RESET, error_summary, fault_in

# Of Ascend/pytorch: NPUQueue.cpp (deviceErrorMap), NPUException.cpp, NPUCachingAllocator.cpp; users' reports.
TEXTS = [
    (
        "HBM MULTI BIT ECC ERROR",
        (
            "HBM MULTI BIT ECC ERROR, E99999: 2025-01-01-00:00:00.000.000 rtStreamSynchronize "
            "failed\n[ERROR] (PID:7, Device:0) ERR00100 PTA call acl api failed"
        ),
    ),
    (
        "HBM MULTI BIT ECC ERROR",
        (
            "NPU function error: HBM MULTI BIT ECC ERROR.reason=[hbm Multi-bit ECC error], time us= 12.time "
            "is 12, error code is 507054"
        ),
    ),
    (
        "UCE ERROR",
        "UCE ERROR, \n[ERROR] 2025-07-30-06:16:22 (PID:1, Device:1, RankID:-1) ERR00100 PTA call acl api failed",
    ),
    ("UCE ERROR", "EE9999: rtStreamSynchronize execute failed, reason=[device mem error][FUNC:FuncErrorReason]"),
    ("SUSPECT MEM ERROR", "copy_d2d: NPU function error: SUSPECT MEM ERROR, error code is 507055"),
    ("SUSPECT REMOTE ERROR", "SUSPECT REMOTE ERROR, EE9999: Inner Error!"),
    ("LINK ERROR", "HCCS LINK ERROR, "),
    ("LINK ERROR", "NPU function error: UB LINK ERROR, error code is 507056"),
    ("LINK ERROR", "rtStreamSynchronize execute failed, reason=[link error]"),
    ("HCCL OP RETRY FAILED", "HCCL OP RETRY FAILED, EI0002"),
    ("FORCE STOP", "npuSynchronizeDevice:NPUStream.cpp:506 NPU function error:  FORCE STOP, error code is 107022"),
    (
        "the device is lost",
        (
            "NPU function error: AclrtSynchronizeDeviceWithTimeout, error code is 507010\n[Error]: The task "
            "scheduler loses the heartbeat."
        ),
    ),
    ("the device is lost", "EE9999: synchronize failed, runtime result = 507901"),
    (
        "out of memory",
        (
            "NPU out of memory. Tried to allocate 52.00 MiB (NPU 0; 60.96 GiB total capacity; 59.36 GiB "
            "already allocated; 8 MiB free)"
        ),
    ),
    ("out of memory", "NPU function error: aclrtMalloc, error code is 207001\n[Error]: Failed to apply for memory."),
    ("out of memory", "EL0004: [PID: 9] Failed to allocate memory."),
    (
        "AI Core exception",
        (
            "npuSynchronizeDevice:NPUStream.cpp:506 NPU function error: AclrtSynchronizeDeviceWithTimeout, "
            "error code is 507015\n[Error]: The aicore execution is abnormal."
        ),
    ),
    (
        "AI Core exception",
        "rtDeviceSynchronizeWithTimeout execute failed, reason=[vector core exception][FUNC:FuncErrorReason]",
    ),
    ("AI Core exception", "wait for compute device to finish failed, runtime result = 507035.[FUNC:ReportCallError]"),
    (
        "AI CPU exception",
        (
            "NPU function error: AclrtSynchronizeDeviceWithTimeout, error code is 507018\n[Error]: The "
            "aicpu execution is abnormal."
        ),
    ),
    (
        "timeout",
        (
            "NPU function error: AclrtSynchronizeStreamWithTimeout(stream()), error code is "
            "507014\n[Error]: The aicore execution times out."
        ),
    ),
    (
        "timeout",
        "NPU function error: c10_npu::acl::AclrtSynchronizeStreamWithTimeout(copy_stream), error code is 507048",
    ),
    ("timeout", "NPU function error: aclrtSynchronizeEvent, error code is 107019\n[Error]: Task execution timed out."),
]


@pytest.mark.parametrize(("name", "text"), TEXTS, ids=[f"{number} {name}" for number, (name, _) in enumerate(TEXTS)])
def test_the_vendors_texts_are_named(name, text):
    assert fault_in(text).name == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        (
            "NPU function error: call aclnnSilu failed, error code is 561103\n[ERROR] (PID:507015, "
            "Device:0, RankID:-1) ERR01100 OPS call acl api failed"
        ),  # a process's number
        "call aclnnAdd failed, error code is 161002\n[Error]: dtype DT_BFLOAT16 is not implemented",
        "Tried to view 507018 elements as (3, 4)",
        "error code is 5070150",
    ],
)
def test_other_errors_are_not(text):
    assert fault_in(text) is None


def test_of_several_the_gravest_is_named():
    assert fault_in("error code is 507015\nEE9999 reason=[hbm Multi-bit ECC error]").name == "HBM MULTI BIT ECC ERROR"


def test_a_fault_that_stays_with_the_card_is_not_sent_to_another_process():
    assert {fault.name for fault in FAULTS if fault.lasts} >= {
        "HBM MULTI BIT ECC ERROR",
        "UCE ERROR",
        "SUSPECT MEM ERROR",
        "the device is lost",
    }
    for fault in FAULTS:
        assert "\n" not in fault.sentence and fault.advice and (fault.codes or fault.texts)
        assert not (fault.lasts and AGAIN in fault.advice) and (fault.lasts or RESET not in fault.advice)
    codes = [code for fault in FAULTS for code in fault.codes]
    assert len(codes) == len(set(codes)) and all(
        f"error code is {code}" and fault_in(f"error code is {code}") for code in codes
    )


def test_an_error_is_one_line_with_what_cann_said():
    text = (
        "npuSynchronizeDevice:NPUStream.cpp:506 NPU function error: AclrtSynchronizeDeviceWithTimeout, "
        "error code is 507015\n"
        "[ERROR] 2025-11-08-21:35:27 (PID:1, Device:0, RankID:-1) ERR00100 PTA call acl api "
        "failed\n[Error]: The aicore execution is abnormal. \n"
        "        Rectify the fault based on the error information in the ascend log.\nEZ9999: Inner Error!\n"
        "EZ9999: [PID: 1] 2025-11-08-21:35:27.904.479 The error from device(chipId:7, dieId:0), there "
        "is an exception of fftsplus aivector error\n"
        "        TraceBack (most recent call last):\n       The extend info: errcode:(0x800000)\n"
    )
    said = error_summary(RuntimeError(text))
    assert (
        said.startswith("RuntimeError: npuSynchronizeDevice:")
        and "there is an exception of fftsplus aivector error" in said
    )
    assert "\n" not in said and "TraceBack" not in said
    queue = (
        "The Inner error is reported as above. The process exits for this inner error, and the current "
        "working operator name is aclnnSilu.\nSince the operator\naclnnSilu: no"
    )
    assert error_summary(RuntimeError(queue)) == "RuntimeError: aclnnSilu failed in torch_npu's queue … aclnnSilu: no"
    assert error_summary(ValueError("one\n")) == "ValueError: one" and error_summary(KeyError()) == "KeyError: "
