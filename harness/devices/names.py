"""The kinds of device by name: each is a line here and a module of that name beside this one.

It imports nothing, since `--help` and the idle plugin read it.
"""

AUTO = "auto"
NUMBERED = {"npu": True, "emulated": False, "cuda": True, "cpu": False}  # whether one of several may be named: npu:1
_ALL = [f"{AUTO} (default)", *(f"{name}[:n]" if numbered else name for name, numbered in NUMBERED.items())]
SPECS_LISTED = f"{', '.join(_ALL[:-1])} or {_ALL[-1]}"  # in the texts of help
SPECS = SPECS_LISTED.replace(" (default)", "", 1)
