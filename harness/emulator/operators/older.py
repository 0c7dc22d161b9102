"""Operators of CANN's older path: a type, inputs in order, attributes by name."""

from __future__ import annotations

from harness.emulator.table import older, operator


@older("Identity TransData")
def identity(x, src_format="", dst_format="", groups=1):
    return x  # the layouts are changed where it is read and where it is written


@operator("aclnnNpuFormatCast", "source >out")
def format_cast(source):
    return source
