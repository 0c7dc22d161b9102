"""Small random-weight configurations of the architectures of transformers and timm: the emulated device against the
CPU.

    python -m harness.conformance architectures [NAME …] [--output FILE]

For each: a forward with HF32 off, which may differ by rounding alone; a forward as torch_npu comes, with HF32
convolutions and the tanh GELU; the gradients of one training step; where the model generates, the tokens. The CPU's
side runs in a process of its own in which no NPU can be seen, since transformers treats attention masks differently
where one is.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.conformance.options import parser_of

_SMALL = {  # what a configuration may call its sizes, and how large they are here
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "embedding_size": 64,
    "embed_dim": 64,
    "word_embed_proj_dim": 64,
    "n_embed": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "d_ff": 128,
    "hidden_dim": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "d_kv": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "head_dim": 16,
    "projection_dim": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "state_size": 8,
    "sliding_window": 16,
}
NO_DROPOUT = ("dropout", "drop_rate", "droppath", "drop_path", "layerdrop", "pdrop")
SEQUENCE, _BATCH = 12, 2
SPREAD = 1.0  # the least standard deviation of a row of weights, times the root of its length


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One entry: how its model is made, and what it is given."""

    name: str
    kind: str
    build: Callable[[], Any]  # the model on the CPU, in float32, seeded by the caller
    inputs: Callable[[Any, Any], dict]  # (model, generator) -> keyword arguments
    generates: bool = False


# -------- transformers


def _shrink(config, changes: dict) -> None:
    """Make every size of a configuration small, parts of it too."""
    for name in list(vars(config)):
        value = getattr(config, name, None)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _shrink(value, changes.get(name, {}))
        elif name in changes:
            setattr(config, name, changes[name])
        elif name in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, _SMALL[name])
        elif any(word in name for word in NO_DROPOUT) and isinstance(value, float):
            setattr(config, name, 0.0)
    for name, value in changes.items():
        if not isinstance(value, dict):
            setattr(config, name, value)
    if "layer_types" in vars(config) and config.layer_types and hasattr(config, "num_hidden_layers"):
        config.layer_types = list(config.layer_types)[: config.num_hidden_layers]
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = changes.get("num_key_value_heads", 2)


def _transformer(model_type: str, kind: str, model_class: str, **changes) -> Architecture:
    generates = changes.pop("generates", False)
    given = changes.pop("inputs", None)

    def build():
        import transformers

        config = transformers.AutoConfig.for_model(model_type)
        _shrink(config, changes)
        return getattr(transformers, model_class)(config)

    return Architecture(name=model_type, kind=kind, build=build, inputs=given or _inputs, generates=generates)


def _inputs(model, generator) -> dict:
    """What the model's forward asks for, as far as names tell."""
    import torch

    config, names = model.config, inspect.signature(model.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", config)
    vocabulary = getattr(text, "vocab_size", 128)
    ids = lambda: torch.randint(3, vocabulary, (_BATCH, SEQUENCE), generator=generator)  # noqa: E731
    main, given = model.main_input_name, {}
    if (
        "input_ids" in names
        and main in ("input_ids", "pixel_values")
        and (main == "input_ids" or hasattr(config, "text_config"))
    ):
        given["input_ids"] = ids()
        if "attention_mask" in names:
            mask = torch.ones(_BATCH, SEQUENCE, dtype=torch.long)
            mask[0, -3:] = 0  # a shorter first sequence
            given["attention_mask"] = mask
    if "pixel_values" in names and (
        main == "pixel_values" or hasattr(config, "vision_config") or config.model_type == "vilt"
    ):
        size = getattr(vision, "image_size", None) or 32
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        given["pixel_values"] = torch.randn(
            _BATCH, getattr(vision, "num_channels", 3), height, width, generator=generator
        )
    if main == "input_values":
        given["input_values"] = torch.randn(_BATCH, *_AUDIO.get(config.model_type, (800,)), generator=generator)
    if main == "input_features":
        given["input_features"] = torch.randn(_BATCH, *_AUDIO.get(config.model_type, (80, 128)), generator=generator)
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = torch.randint(3, 128, (_BATCH, 6), generator=generator)
    return given


def _masked_picture(model, generator) -> dict:
    import torch

    return {
        **_inputs(model, generator),
        "noise": torch.rand(_BATCH, (model.config.image_size // model.config.patch_size) ** 2, generator=generator),
    }


_AUDIO = {
    "audio-spectrogram-transformer": (64, 32),
    "whisper": (20, 128),
    "speech_to_text": (64, 20),
    "encodec": (1, 1280),
    "wav2vec2-bert": (40, 160),
    "clap": (1, 64, 64),
}
_LM = dict(kind="decoder", generates=True)
_CONVS = dict(
    conv_dim=(32, 32),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)


def _language(model_type: str, model_class: str, **changes) -> Architecture:
    return _transformer(model_type, model_class=model_class, **(_LM | changes))


def transformers_architectures() -> list[Architecture]:
    """The entries of transformers, by kind."""
    return [
        *_encoders(),
        *_decoders(),
        *_state_space(),
        *_encoder_decoders(),
        *_vision(),
        *_convolutional(),
        *_picture_features(),
        *_audio(),
        *_multimodal(),
    ]


def _encoders() -> list[Architecture]:
    """Models that read a text."""
    return [
        _transformer("bert", "encoder", "BertForMaskedLM"),
        _transformer("roberta", "encoder", "RobertaForMaskedLM", pad_token_id=1),
        _transformer("distilbert", "encoder", "DistilBertForMaskedLM"),
        _transformer("albert", "encoder", "AlbertForMaskedLM"),
        _transformer("electra", "encoder", "ElectraForMaskedLM"),
        _transformer("deberta-v2", "encoder", "DebertaV2ForMaskedLM"),
        _transformer("mpnet", "encoder", "MPNetForMaskedLM", pad_token_id=1),
        _transformer("modernbert", "encoder", "ModernBertForMaskedLM", local_attention=8),
        _transformer("xlm-roberta", "encoder", "XLMRobertaForMaskedLM", pad_token_id=1),
        _transformer("fnet", "encoder", "FNetForMaskedLM"),
    ]


def _decoders() -> list[Architecture]:
    """Models that go on with a text."""
    return [
        _language("gpt2", "GPT2LMHeadModel"),
        _language(
            "gpt_neo",
            "GPTNeoForCausalLM",
            attention_types=[[["global", "local"], 1]],
            attention_layers=["global", "local"],
            window_size=8,
        ),
        _language("gpt_neox", "GPTNeoXForCausalLM"),
        _language("gptj", "GPTJForCausalLM", rotary_dim=8),
        _language("opt", "OPTForCausalLM"),
        _language("bloom", "BloomForCausalLM"),
        _language("llama", "LlamaForCausalLM"),
        _language("mistral", "MistralForCausalLM"),
        _language("mixtral", "MixtralForCausalLM"),
        _language("qwen2", "Qwen2ForCausalLM"),
        _language("qwen3", "Qwen3ForCausalLM"),
        _language("qwen2_moe", "Qwen2MoeForCausalLM"),
        _language("gemma", "GemmaForCausalLM"),
        _language("gemma2", "Gemma2ForCausalLM", query_pre_attn_scalar=16),
        _language("phi", "PhiForCausalLM"),
        _language("phi3", "Phi3ForCausalLM"),
        _language("falcon", "FalconForCausalLM"),
        _language("starcoder2", "Starcoder2ForCausalLM"),
        _language("stablelm", "StableLmForCausalLM"),
        _language("olmo", "OlmoForCausalLM"),
        _language("cohere", "CohereForCausalLM"),
        _language("mpt", "MptForCausalLM"),
        _language("granite", "GraniteForCausalLM"),
    ]


def _state_space() -> list[Architecture]:
    """Models with a state in place of attention."""
    return [
        _language("mamba", "MambaForCausalLM", kind="state-space", intermediate_size=128, time_step_rank=4),
        _language(
            "mamba2",
            "Mamba2ForCausalLM",
            kind="state-space",
            num_heads=8,
            head_dim=16,
            expand=2,
            n_groups=2,
            chunk_size=8,
            state_size=8,
        ),
        _language(
            "falcon_mamba", "FalconMambaForCausalLM", kind="state-space", intermediate_size=128, time_step_rank=4
        ),
        _language("rwkv", "RwkvForCausalLM", kind="state-space", attention_hidden_size=64, context_length=64),
    ]


def _encoder_decoders() -> list[Architecture]:
    """Models that read one text and write another."""
    return [
        _transformer("t5", "encoder-decoder", "T5ForConditionalGeneration", generates=True, decoder_start_token_id=1),
        _transformer(
            "bart", "encoder-decoder", "BartForConditionalGeneration", generates=True, forced_eos_token_id=None
        ),
        _transformer(
            "mbart", "encoder-decoder", "MBartForConditionalGeneration", generates=True, forced_eos_token_id=None
        ),
        _transformer(
            "marian",
            "encoder-decoder",
            "MarianMTModel",
            generates=True,
            decoder_vocab_size=128,
            forced_eos_token_id=None,
        ),
        _transformer(
            "pegasus", "encoder-decoder", "PegasusForConditionalGeneration", generates=True, forced_eos_token_id=None
        ),
        _transformer("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", generates=True),
    ]


def _vision() -> list[Architecture]:
    """Classifiers of pictures by attention alone."""
    return [
        _transformer("vit", "vision", "ViTForImageClassification"),
        _transformer("deit", "vision", "DeiTForImageClassification"),
        _transformer("beit", "vision", "BeitForImageClassification", out_indices=None, out_features=None),
        _transformer("dinov2", "vision", "Dinov2ForImageClassification", out_indices=None, out_features=None),
        _transformer(
            "swin",
            "vision",
            "SwinForImageClassification",
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 4],
            window_size=4,
            patch_size=2,
            hidden_size=32,
            out_indices=None,
            out_features=None,
        ),
    ]


def _convolutional() -> list[Architecture]:
    """Classifiers of pictures with convolutions."""
    return [
        _transformer(
            "convnext",
            "vision",
            "ConvNextForImageClassification",
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_stages=2,
            patch_size=4,
            out_indices=None,
            out_features=None,
        ),
        _transformer(
            "resnet",
            "vision",
            "ResNetForImageClassification",
            hidden_sizes=[16, 32],
            depths=[1, 1],
            embedding_size=16,
            out_indices=None,
            out_features=None,
        ),
        _transformer(
            "segformer",
            "vision",
            "SegformerForSemanticSegmentation",
            hidden_sizes=[16, 16, 32, 32],
            num_attention_heads=[1, 2, 2, 4],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=32,
            image_size=64,
            patch_sizes=[7, 3, 3, 3],
        ),
        _transformer(
            "mobilevit",
            "vision",
            "MobileViTForImageClassification",
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 32],
            image_size=64,
            patch_size=2,
        ),
        _transformer(
            "regnet",
            "vision",
            "RegNetForImageClassification",
            hidden_sizes=[16, 32, 32, 64],
            depths=[1, 1, 1, 1],
            embedding_size=16,
            groups_width=8,
        ),
    ]


def _picture_features() -> list[Architecture]:
    """Models that return features, places or pictures."""
    return [
        _transformer("aimv2_vision_model", "vision", "Aimv2VisionModel"),
        _transformer("siglip_vision_model", "vision", "SiglipVisionModel"),
        _transformer(
            "poolformer",
            "vision",
            "PoolFormerForImageClassification",
            hidden_sizes=[16, 16, 32, 32],
            depths=[1, 1, 1, 1],
            image_size=64,
            patch_sizes=[7, 3, 3, 3],
        ),
        _transformer("yolos", "vision", "YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=4),
        _transformer(
            "vit_mae",
            "vision",
            "ViTMAEForPreTraining",
            inputs=_masked_picture,
            mask_ratio=0.5,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
        ),
    ]


def _audio() -> list[Architecture]:
    """Models of sound."""
    return [
        _transformer("wav2vec2", "audio", "Wav2Vec2ForCTC", mask_time_prob=0.0, **_CONVS),
        _transformer("hubert", "audio", "HubertForCTC", mask_time_prob=0.0, **_CONVS),
        _transformer("wavlm", "audio", "WavLMForCTC", mask_time_prob=0.0, **_CONVS),
        _transformer(
            "whisper",
            "audio",
            "WhisperForConditionalGeneration",
            num_mel_bins=20,
            max_source_positions=64,
            max_target_positions=32,
        ),
        _transformer(
            "audio-spectrogram-transformer",
            "audio",
            "ASTForAudioClassification",
            max_length=64,
            num_mel_bins=32,
            frequency_stride=4,
            time_stride=4,
        ),
        _transformer(
            "speech_to_text",
            "audio",
            "Speech2TextForConditionalGeneration",
            input_feat_per_channel=20,
            max_source_positions=64,
            max_target_positions=32,
            conv_channels=32,
        ),
    ]


def _multimodal() -> list[Architecture]:
    """Models of pictures or sound, and text."""
    return [
        _transformer("clip", "multimodal", "CLIPModel"),
        _transformer("siglip", "multimodal", "SiglipModel", text_config={"projection_size": 64}),
        _transformer("blip", "multimodal", "BlipForConditionalGeneration", text_config={"encoder_hidden_size": 64}),
        _transformer("chinese_clip", "multimodal", "ChineseCLIPModel"),
        _transformer("vilt", "multimodal", "ViltModel"),
        _transformer("altclip", "multimodal", "AltCLIPModel"),
    ]


# -------- timm


_TIMM = {  # model: what makes it small
    "resnet18": {},
    "resnext50_32x4d": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "densenet121": {},
    "regnetx_002": {},
    "vgg11_bn": {},
    "convnext_atto": {},
    "mixer_s32_224": {},
    "gmlp_ti16_224": {},
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {},
    "swin_tiny_patch4_window7_224": {
        "depths": (1, 1, 1, 1),
        "embed_dim": 24,
        "num_heads": (1, 2, 4, 8),
        "drop_path_rate": 0.0,
    },
    "pvt_v2_b0": {},
    "poolformer_s12": {},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "ghostnet_050": {},
    "repvgg_a0": {},
    "xcit_nano_12_p16_224": {},
    "levit_128s": {},
    "coat_lite_tiny": {},
    "tnt_s_patch16_224": {"depth": 2},
    "visformer_tiny": {},
    "lcnet_050": {},
    "hardcorenas_a": {},
    "dla34": {},
}
TIMM_KINDS = {
    "attention": ("vit", "deit", "swin", "pvt", "xcit", "levit", "coat", "tnt", "visformer"),
    "mlp": ("mixer", "gmlp"),
}


def _timm(name: str, changes: dict) -> Architecture:
    def build():
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, **changes)

    def inputs(model, generator) -> dict:
        import torch

        return {"x": torch.randn(_BATCH, *model.default_cfg["input_size"], generator=generator)}

    kind = next((kind for kind, names in TIMM_KINDS.items() if name.startswith(names)), "convolutional")
    return Architecture(name=f"timm/{name}", kind=kind, build=build, inputs=inputs)


def architectures() -> list[Architecture]:
    """Every entry, transformers first."""
    return [*transformers_architectures(), *(_timm(*pair) for pair in _TIMM.items())]


# -------- running


def made(entry: Architecture):
    """The model of an architecture with weights of ordinary size, and its inputs."""
    import torch

    torch.manual_seed(0)
    model = entry.build().float()
    with torch.no_grad():
        for parameter in (
            model.parameters()
        ):  # fresh weights are so small that a GELU sees nothing but its linear part, and some heads are zero
            least = SPREAD / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.0
            if not parameter.any() and parameter.dim() == 2:
                parameter.normal_(0.0, least)
            elif parameter.dim() == 2 and float(parameter.std()) < least:
                parameter.mul_(least / float(parameter.std()))
    return model, entry.inputs(model, torch.Generator().manual_seed(1))


def _to(value, device, dtype):
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in value.items()}


def _outputs(result) -> dict:
    """The floating tensors of what a model returned, by name."""
    import torch

    if isinstance(result, torch.Tensor):
        return {"output": result} if result.is_floating_point() else {}
    if hasattr(result, "items"):
        items = result.items()
    else:
        items = enumerate(result) if isinstance(result, (tuple, list)) else ()
    return {f"{name}.{inner}": tensor for name, value in items for inner, tensor in _outputs(value).items()}


def run_architecture(entry: Architecture, device, dtype=None) -> dict:
    """What an architecture computes on a device: outputs, gradients of one training step, generated tokens, on the
    CPU.
    """
    import torch

    model, inputs = made(entry)
    model, inputs = model.to(device, dtype).eval(), _to(inputs, device, dtype or torch.float32)
    with torch.no_grad():
        result = {f"forward/{name}": value for name, value in _outputs(model(**inputs)).items()}
        if entry.generates:
            given = {name: inputs[name][-1:] for name in ("input_ids", "attention_mask") if name in inputs}
            result["tokens"] = model.generate(
                **given, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True
            )
    model.train()
    torch.manual_seed(0)
    loss = sum(value.float().square().mean() for value in _outputs(model(**inputs)).values() if value.requires_grad)
    loss.backward()
    result["loss"] = loss.detach()
    result |= {
        f"gradient/{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {name: value.detach().cpu().clone().contiguous() for name, value in result.items()}


def difference(result: dict, expected: dict, part: str) -> tuple[float, float]:
    """The largest difference and the relative L2 error over all tensors of one part; infinite where tensors are
    missing.
    """
    names = {name for name in expected if name.startswith(part)}
    if not names or {name for name in result if name.startswith(part)} != names:
        return math.inf, math.inf
    squares, total, largest = 0.0, 0.0, 0.0
    for name in names:
        gap = result[name].double() - expected[name].double()
        if gap.numel():
            largest = max(largest, float(gap.abs().max())) if math.isfinite(float(gap.abs().max())) else math.nan
        squares += float(gap.square().sum())
        total += float(expected[name].double().square().sum())
    return largest, math.sqrt(squares / total) if total else math.sqrt(squares)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table; errors are relative L2, over all tensors of the part."""

    name: str
    kind: str
    parameters: int = 0
    rounding: float = math.nan  # of the CPU's float32 forward, against its float64
    exact: tuple[float, float] = (math.nan, math.nan)  # forward with HF32 off and torch's GELU: max_diff, rel_l2
    default: tuple[float, float] = (math.nan, math.nan)  # forward as torch_npu comes
    gradient: float = math.nan  # with HF32 off and torch's GELU
    tokens: str = ""
    fell_back: tuple[str, ...] = ()
    problem: str = ""


def compute(names: list[str], folder: Path, way: str) -> None:
    """In a process of its own, since transformers looks for an NPU once and torch_npu reads its GELU switch once: write
    what each named architecture computes in one of the WAYS, or a text that says why it did not."""
    from safetensors.torch import save_file

    if way in ("cpu", "golden"):
        _hide_torch_npu()
    import torch

    from harness.conformance.vision import declare_torchvision
    from harness.devices import open_device

    device = open_device("cpu" if way in ("cpu", "golden") else "emulated")
    if way == "exact":
        torch.npu.conv.allow_hf32 = False
        torch.npu.use_compatible_impl(True)
    declare_torchvision()
    for entry in _chosen(names):
        target = _path_of(folder, way, entry)
        try:
            with device.watch() as seen:
                result = run_architecture(entry, device.torch_device, torch.float64 if way == "golden" else None)
            save_file(result, target.with_suffix(".tmp"), metadata={"fell_back": " ".join(seen.fell_back)})
            target.with_suffix(".tmp").rename(target.with_suffix(".safetensors"))
        except Exception as error:  # noqa: BLE001  one entry that does not run must not end the table
            lines = [
                line for line in str(error).splitlines() if "not emulated" in line
            ] or traceback.format_exception_only(error)
            target.with_suffix(".txt").write_text(f"{way}: {lines[0].strip()[:200]}")


# The CPU; the CPU in float64; the device with HF32 off and torch's GELU; the device as torch_npu comes.
WAYS = ("cpu", "golden", "exact", "default")


def _path_of(folder: Path, way: str, entry: Architecture) -> Path:
    return folder / f"{way}-{entry.name.replace('/', '-')}.x"


def _result(entry: Architecture, folder: Path) -> Result:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    paths = {way: _path_of(folder, way, entry) for way in WAYS}
    problems = {
        way: path.with_suffix(".txt").read_text() for way, path in paths.items() if path.with_suffix(".txt").exists()
    }
    golden = None if problems.pop("golden", None) else load_file(paths["golden"].with_suffix(".safetensors"))
    if problems:
        return Result(name=entry.name, kind=entry.kind, problem=next(iter(problems.values())))
    expected, exact, default = (
        load_file(paths[way].with_suffix(".safetensors")) for way in ("cpu", "exact", "default")
    )
    with safe_open(paths["exact"].with_suffix(".safetensors"), "pt") as stored:
        fell_back = tuple(stored.metadata()["fell_back"].split())
    tokens = ""
    if "tokens" in expected:
        tokens = "same" if torch.equal(exact["tokens"], expected["tokens"]) else "other"
    return Result(
        name=entry.name,
        kind=entry.kind,
        parameters=sum(value.numel() for name, value in expected.items() if name.startswith("gradient/")),
        rounding=math.nan if golden is None else difference(expected, golden, "forward/")[1],
        exact=difference(exact, expected, "forward/"),
        default=difference(default, expected, "forward/"),
        gradient=difference(exact, expected, "gradient/")[1],
        tokens=tokens,
        fell_back=fell_back,
    )


def _hide_torch_npu() -> None:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch_npu" else find(name, package)


def _chosen(names: list[str]) -> list[Architecture]:
    known = {entry.name: entry for entry in architectures()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no architecture is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def results(names: list[str]) -> list[Result]:
    """One result for each named architecture, or for all."""
    with tempfile.TemporaryDirectory() as work:
        for way in WAYS:
            command = [sys.executable, "-m", "harness.conformance", "architectures", *names, "--compute", way, work]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:  # what it had computed before is kept
                last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
                for entry in _chosen(names):
                    target = _path_of(Path(work), way, entry)
                    if not target.with_suffix(".safetensors").exists() and not target.with_suffix(".txt").exists():
                        target.with_suffix(".txt").write_text(
                            f"{way}: the process ended with {done.returncode}: {last[:200]}"
                        )
        return [_result(entry, Path(work)) for entry in _chosen(names)]


def _table(rows: list[Result]) -> str:
    """The results as markdown."""
    lines = [
        (
            "| architecture | kind | parameters | CPU rel_l2 to float64 | max_diff | rel_l2 | rel_l2 as it comes | "
            "rel_l2 of gradients | tokens | fell back | problem |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            row.kind,
            f"{row.parameters:,}",
            f"{row.rounding:.1e}",
            f"{row.exact[0]:.1e}",
            f"{row.exact[1]:.1e}",
            f"{row.default[1]:.1e}",
            f"{row.gradient:.1e}",
            row.tokens,
            ", ".join(row.fell_back),
            row.problem,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    arguments = parser_of("architectures").parse_args(argv)
    if arguments.compute:
        compute(arguments.names, Path(arguments.compute[1]), arguments.compute[0])
        return 0
    result = results(arguments.names)
    print(_table(result))
    if arguments.output:
        arguments.output.write_text(_table(result) + "\n")
    bad = [item for item in result if item.problem]
    print(f"{len(result) - len(bad)} of {len(result)} ran")
    return 1 if bad else 0
