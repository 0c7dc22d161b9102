#!/usr/bin/env python3
"""Convert a checkpoint of AIMv2 from the layout of transformers or timm to Apple's, which the model here takes.

    python convert_weights.py MODEL_DIR OUTPUT_DIR

Keys are renamed, and query, key and value become one matrix; no number is changed. Whatever is left over or missing is
an error.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TRANSFORMERS = {
    r"embeddings\.patch_embed\.(weight|bias)": r"preprocessor.patchifier.proj.\1",
    r"embeddings\.rms_norm\.weight": r"preprocessor.patchifier.norm.weight",
    r"embeddings\.position_embedding\.weight": r"preprocessor.pos_embed",
    r"encoder\.layers\.(\d+)\.rms_norm([12])\.weight": r"trunk.blocks.\1.norm_\2.weight",
    r"encoder\.layers\.(\d+)\.attention\.([qkv])_proj\.weight": r"trunk.blocks.\1.attn.\2.weight",
    r"encoder\.layers\.(\d+)\.attention\.out_proj\.weight": r"trunk.blocks.\1.attn.proj.weight",
    r"encoder\.layers\.(\d+)\.ffn\.gate_proj\.weight": r"trunk.blocks.\1.mlp.fc1.weight",
    r"encoder\.layers\.(\d+)\.ffn\.down_proj\.weight": r"trunk.blocks.\1.mlp.fc2.weight",
    r"encoder\.layers\.(\d+)\.ffn\.up_proj\.weight": r"trunk.blocks.\1.mlp.fc3.weight",
    r"rms_norm\.weight": r"trunk.post_trunk_norm.weight",
    r"head\.([kv])_proj\.weight": r"head.\1.weight",
    r"head\.output_proj\.(weight|bias)": r"head.linear.\1",
    r"(head\.cls_token)": r"\1",
}
TIMM = {
    r"patch_embed\.proj\.(weight|bias)": r"preprocessor.patchifier.proj.\1",
    r"patch_embed\.norm\.weight": r"preprocessor.patchifier.norm.weight",
    r"pos_embed": r"preprocessor.pos_embed",
    r"blocks\.(\d+)\.norm([12])\.weight": r"trunk.blocks.\1.norm_\2.weight",
    r"blocks\.(\d+)\.attn\.(qkv|proj)\.weight": r"trunk.blocks.\1.attn.\2.weight",
    r"blocks\.(\d+)\.mlp\.fc1_g\.weight": r"trunk.blocks.\1.mlp.fc1.weight",
    r"blocks\.(\d+)\.mlp\.fc1_x\.weight": r"trunk.blocks.\1.mlp.fc3.weight",
    r"blocks\.(\d+)\.mlp\.fc2\.weight": r"trunk.blocks.\1.mlp.fc2.weight",
    r"norm\.weight": r"trunk.post_trunk_norm.weight",
}
APPLE = {r"((?:preprocessor|trunk|head)\..+)": r"\1"}
LAYOUTS = {"transformers": TRANSFORMERS, "timm": TIMM, "apple": APPLE}
FIRST = {"apple": ("preprocessor.", "trunk."), "transformers": ("embeddings.", "encoder."), "timm": ("patch_embed.",)}
IMAGE_TOWERS = ("image_encoder.", "vision_model.")  # of a checkpoint with an image tower and a text tower


def layout_of(names):
    """The layout of a checkpoint by its keys alone. Raises: ValueError for keys of none."""
    for layout, words in FIRST.items():
        if any(name.startswith(words) for name in names):
            return layout
    raise ValueError(f"these are no keys of AIMv2: {', '.join(sorted(names)[:3])} …")


def converted(tensors):
    """The tensors of a checkpoint under the names of the model. Raises: ValueError for keys that are of no layout."""
    for tower in IMAGE_TOWERS:
        own = {name[len(tower) :]: tensor for name, tensor in tensors.items() if name.startswith(tower)}
        tensors = own or tensors
    rules, result = LAYOUTS[layout_of(tensors)], {}
    for name, tensor in tensors.items():
        match = next((match for pattern in rules if (match := re.fullmatch(pattern, name))), None)
        if match is None:
            raise ValueError(f"the key {name} belongs to no AIMv2 in this layout")
        result[match.expand(rules[match.re.pattern])] = tensor
    for name in [name for name in result if name.endswith(".attn.q.weight")]:
        parts = [result.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        result[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    positions = result.get("preprocessor.pos_embed")
    if positions is not None and positions.dim() == 2:
        result["preprocessor.pos_embed"] = positions[None]
    return result


def read(folder):
    """All tensors of a directory's safetensors files. Raises: FileNotFoundError where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; set MODEL_DIR to the checkpoint's directory")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def main():
    parser = argparse.ArgumentParser(description="Convert a checkpoint of AIMv2 to the layout of the model here.")
    parser.add_argument("source", type=Path, metavar="MODEL_DIR")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="a new directory")
    arguments = parser.parse_args()
    try:
        tensors = read(arguments.source)
        result = {name: tensor.contiguous() for name, tensor in converted(tensors).items()}
        arguments.output.mkdir(parents=True)
    except (ValueError, OSError) as error:
        sys.exit(f"convert_weights.py: {error}")
    save_file(result, arguments.output / "model.safetensors", metadata={"format": "pt"})
    if (arguments.source / "config.json").is_file():
        shutil.copy(arguments.source / "config.json", arguments.output)
    print(json.dumps({"layout": layout_of(result), "tensors": len(result), "read": len(tensors)}))


if __name__ == "__main__":
    main()
