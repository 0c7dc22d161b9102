"""Small checkpoints for the tests: whole ones, sharded ones, and files broken on purpose."""

import json
import struct
from pathlib import Path

from safetensors.torch import save_file

from harness.models.aimv2 import AIMv2Config, build

SMALL = dict(width=64, depth=3, heads=4, hidden=176)
KINDS = {"plain": dict(image_size=56), "head": dict(image_size=56, pool=True), "native": dict(image_size=None)}


def model(kind="plain", seed=1):
    return build(AIMv2Config(**SMALL, **KINDS[kind]), seed)


def write(folder: Path, tensors, shards=1, config=True, **fields):
    """A checkpoint in `folder`: one file, or shards with an index."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    else:
        files = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
        for n, file in enumerate(files):
            save_file({name: tensors[name].contiguous() for name in names[n::shards]}, folder / file)
        weight_map = {name: files[n % shards] for n, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config:
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "rms_norm_eps": 1e-5} | fields))
    return folder


def write_raw(path: Path, header, data=b"", length=None):
    """A file with this header, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path
