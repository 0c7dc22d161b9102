"""Comparing two sets of 100 tensors of 1,000,000 float32 values: 4 s and 300 MiB on two cores.

The 800 MB that are compared lie in files and are read as they come, as stored outputs are; memory is the process's
peak.
"""

from harness.benchmarks import Figure, in_child

_CODE = """
import json, os, sys, tempfile, time
import numpy
from harness.benchmarks import high_water
import torch
torch.set_num_threads(2)
from harness import compare
with tempfile.TemporaryDirectory() as folder:
    generator = numpy.random.default_rng(0)
    for side in "ae":
        for n in range(100):
            generator.standard_normal(1_000_000, dtype=numpy.float32).tofile(f"{folder}/{side}{n}")
    def read(side, n):
        return torch.from_numpy(numpy.fromfile(f"{folder}/{side}{n}", dtype=numpy.float32)).view(1000, 1000)
    compare(read("a", 0), read("e", 0))
    begin = time.perf_counter()
    total = sum(compare(read("a", n), read("e", n)).max_diff for n in range(100))
    seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "mib": high_water() / 2**20}))
"""


def measure() -> list[Figure]:
    result = in_child(_CODE)
    return [
        Figure(name="compare 100 x 1,000,000 float32, time", value=result["seconds"], promise=4.0, unit="s"),
        Figure(name="compare 100 x 1,000,000 float32, peak memory", value=result["mib"], promise=300.0, unit="MiB"),
    ]
