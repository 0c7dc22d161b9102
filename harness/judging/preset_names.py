"""The presets by name, and which references each needs. It imports nothing, since `--help` and the idle plugin read it.

The checks of each are in `presets.py`.
"""

PRESET_NAMES = ("floor", "sharp", "card", "cann", "dynamo", "close", "pair")
PRESETS_LISTED = f"{', '.join(PRESET_NAMES[:-1])} or {PRESET_NAMES[-1]}"  # in the texts of help
NEED_REFERENCES = ("floor", "sharp", "dynamo")  # errors to float64
NEED_FORECAST = ("floor", "sharp")  # the expected error of a healthy device
NEED_OTHER_TIES = ("sharp",)  # a second forecast, whose HF32 ties go the other way
