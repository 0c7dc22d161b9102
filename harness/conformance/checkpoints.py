"""Checkpoint directories of small random models: what `pytest -k precision --checkpoint FOLDER` runs without a line of
Python.

    python -m harness.conformance checkpoints FOLDER [NAME …]

The models are those of `harness.conformance.architectures`, saved by their libraries as safetensors, every second of
them with a tokenizer or an image processor; six components of diffusers; and an adapter, a sentence encoder and
programs. Nothing of it is committed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.checkpoints.libraries import library
from harness.checkpoints.material import TEXT_LANGUAGES, sentences
from harness.conformance.architectures import made, transformers_architectures
from harness.conformance.options import parser_of
from harness.devices import without_broken_npu

_TEXT = ("encoder", "decoder", "state-space", "encoder-decoder")
STAGES = ("out_features", "out_indices", "stage_names")  # of a config before it was made small


def write_directories(folder: Path, names: list[str]) -> list[Path]:
    """Write the named directories, or all; returns their paths. Raises: ValueError for an unknown name."""
    with without_broken_npu():
        import transformers

        transformers.logging.set_verbosity_error()
        makers = known()
        unknown = [item for item in names if item not in makers]
        if unknown:
            raise ValueError(f"no checkpoint is called {', '.join(unknown)}; there are {', '.join(makers)}")
        for name in names or makers:
            makers[name](folder / name)
    return [folder / name for name in names or makers]


def known() -> dict[str, Callable[[Path], None]]:
    """What writes each directory, by name: transformers first, then diffusers, then adapters and programs."""
    makers: dict[str, Callable[[Path], None]] = {}
    for index, entry in enumerate(transformers_architectures()):
        makers[entry.name] = lambda path, entry=entry, beside=index % 2 == 0: _save(entry, path, beside)
    makers |= {f"diffusers-{name}": make for name, make in _components().items()}
    return makers | {"adapter": _adapter, "sentences": _sentences}


# -------- transformers


def tokenizer(vocabulary: int = 128) -> Any:
    """A small tokenizer of transformers, trained on the sentences that text models are given."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = dict(pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    lines = [line for language in TEXT_LANGUAGES for line in sentences(language)]
    how = dict(vocab_size=vocabulary, limit_alphabet=80, special_tokens=list(special.values()), show_progress=False)
    trained.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(**how))
    return PreTrainedTokenizerFast(tokenizer_object=trained, **special)


def _save(entry: Any, path: Path, beside: bool) -> None:
    """Save an architecture; `beside`: its tokenizer or its image processor too."""
    model, _ = made(entry)
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    if "stage_names" in config or "out_features" in config:  # transformers refuses those of the larger model
        (path / "config.json").write_text(
            json.dumps({name: item for name, item in config.items() if name not in STAGES})
        )
    if not beside:
        return
    if entry.kind in _TEXT:
        tokenizer().save_pretrained(path)
    size = config.get("image_size")
    if entry.kind == "vision" and isinstance(size, int):
        from transformers import ViTImageProcessor

        ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(path)
    if entry.kind == "audio" and "conv_stride" in config:
        from transformers import Wav2Vec2FeatureExtractor

        Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(path)


# -------- diffusers, PEFT, sentence-transformers


def _components() -> dict[str, Callable[[Path], None]]:
    common = dict(norm_num_groups=8)
    blocks = dict(block_out_channels=(32, 32), layers_per_block=1, attention_head_dim=8, sample_size=16, **common)
    crossed = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    plain = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    coder = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    heads = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, sample_size=8, patch_size=2, in_channels=4)
    sizes: dict[str, dict[str, Any]] = {
        "UNet2DModel": blocks | plain,
        "UNet2DConditionModel": blocks | crossed | dict(cross_attention_dim=32),
        "AutoencoderKL": dict(block_out_channels=(32, 32), latent_channels=4, sample_size=32, **coder, **common),
        "VQModel": dict(block_out_channels=(32,), num_vq_embeddings=32, latent_channels=3, **common),
        "DiTTransformer2DModel": heads | dict(num_embeds_ada_norm=100, **common),
        "SD3Transformer2DModel": heads
        | dict(joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4)
        | dict(pos_embed_max_size=16),
    }
    return {name: lambda path, name=name, how=how: _component(name, how, path) for name, how in sizes.items()}


def _component(name: str, how: dict[str, Any], path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = getattr(library("diffusers", "diffusers"), name)(**how)
    with torch.no_grad():
        for parameter in model.parameters():  # a last layer of zeros would hide all before it
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(path)


def _adapter(path: Path) -> None:
    """A LoRA adapter beside its base model, which is written if it is not there."""
    import torch

    peft = library("peft", "PEFT")
    from transformers import LlamaForCausalLM

    base = path.parent / "llama"
    if not base.is_dir():
        known()["llama"](base)
    torch.manual_seed(0)
    how = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(**how))
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(path)


def _sentences(path: Path) -> None:
    """A sentence encoder: a small BERT, its tokenizer, a mean over the tokens."""
    import torch
    from transformers import BertConfig, BertModel

    library("sentence_transformers", "sentence-transformers")
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    BertModel(BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    encoder = models.Transformer(str(path), max_seq_length=24)
    SentenceTransformer(modules=[encoder, models.Pooling(32)], device="cpu").save(str(path))


def main(argv: list[str]) -> int:
    arguments = parser_of("checkpoints").parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = write_directories(arguments.folder, arguments.names)
    print(f"{len(result)} checkpoints in {arguments.folder}", file=sys.stderr)
    return 0
