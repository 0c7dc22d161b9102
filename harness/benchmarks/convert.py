"""Converting a full-size checkpoint: peak memory below 1.2 times the largest shard, time within 1.5 of safetensors' own
copy.
"""

import tempfile
from pathlib import Path
from statistics import median

from harness.benchmarks import Figure, in_child

PRELUDE = """
import json, os, sys, time
from harness.benchmarks import high_water
source, target = sys.argv[1:3]
"""
CONVERT = (
    PRELUDE
    + """
from harness.models.aimv2 import convert_checkpoint
begin = time.perf_counter()
convert_checkpoint(source, target, to=sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": high_water()}))
"""
)
COPY = (
    PRELUDE
    + """
import torch
from safetensors.torch import load_file, save_file
os.mkdir(target)
begin = time.perf_counter()
save_file(load_file(source + "/model.safetensors"), target + "/model.safetensors")
print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": high_water()}))
"""
)
_ROUNDS = 6


def measure() -> list[Figure]:
    import shutil

    from safetensors.torch import save_file

    import harness  # noqa: F401
    from harness.models.aimv2 import build

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "apple"
        source.mkdir()
        save_file(build("aimv2-large-patch14-224-distilled", 0).state_dict(), source / "model.safetensors")
        size = (source / "model.safetensors").stat().st_size
        ours, theirs = [], []
        for n in range(_ROUNDS):
            pair = (("converted", ours, CONVERT), ("copied", theirs, COPY))
            for kind, results, code in pair if n % 2 else pair[::-1]:  # whoever writes first pays for fresh memory
                target = Path(folder) / f"{kind}{n}"
                results.append(in_child(code, str(source), str(target), "transformers"))
                shutil.rmtree(target)
    return [
        Figure(
            name="convert, whole process's peak memory / largest shard",
            value=max(item["bytes"] for item in ours) / size,
            promise=1.2,
        ),
        Figure(
            name="convert, time / safetensors' own read and write",
            value=median(item["seconds"] for item in ours) / median(item["seconds"] for item in theirs),
            promise=1.5,
        ),
    ]
