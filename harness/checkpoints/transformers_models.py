"""Checkpoints of transformers: the class that `architectures` names, its own tokenizer and processors, its tasks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoints.conversion import read_checkpoint
from harness.checkpoints.libraries import PERMISSION, keys_left_out, library, loading, shapes_that_differ
from harness.checkpoints.material import Asked, frames, ids, pictures, ragged_mask, sounds, texts
from harness.checkpoints.padding import NOTE, tokens_alone, without_padding
from harness.checkpoints.recognition import Recognised, read_config
from harness.checkpoints.weights import require_room, require_weights
from harness.errors import CheckpointError
from harness.measure.generation import greedy

_KIND = "transformers"
_STEPS = 8  # tokens that a generation makes
_FORWARD, DECODE, BATCH, GENERATE = "forward", "decode", "batch", "generate"
# The tables of transformers whose classes return `logits` with a decision along their last axis.
DECIDING = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "OBJECT_DETECTION",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIPLE_CHOICE",
)
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
PROCESSORS = {  # the Auto classes of what prepares inputs, in words
    "AutoTokenizer": "tokenizer",
    "AutoImageProcessor": "image processor",
    "AutoFeatureExtractor": "feature extractor",
    "AutoProcessor": "processor",
}
BY_FUNCTION = "which cannot be drawn here; write a function that returns a Case and give it as module:function"
CACHES = ("cache", "past_key_values", "cache_params")  # what versions of transformers call it, the newest first
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_text_len")


# -------- the model


def config_of(path: Path, asked: Asked) -> Any:
    """The configuration of a directory. Raises: CheckpointError."""
    transformers = library("transformers", _KIND)
    fields = read_config(path / "config.json")
    kind = fields.get("model_type")
    if not asked.trust_remote_code and fields.get("auto_map") and kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(_remote(path, fields["auto_map"]))
    if not fields.get("auto_map") and kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{path} holds a model of the type {kind!r}, which transformers {transformers.__version__} lacks; install "
            "the version that has it"
        )
    with loading(f"the config of {path}"):
        return transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=asked.trust_remote_code, local_files_only=True
        )


def _remote(path: Path, auto_map: Mapping[str, Any]) -> str:
    files = sorted({str(item).split(".")[0] + ".py" for item in auto_map.values()})
    return (
        f"{path} is computed by code of its own ({', '.join(files)}), which runs only with permission; read it, then "
        f"add {PERMISSION}"
    )


def _class_of(path: Path, config: Any, asked: Asked) -> type:
    """The class of the model: of transformers, or of the checkpoint's own code where that is permitted.

    Raises: CheckpointError for a class that transformers lacks, and for code without permission.
    """
    transformers = library("transformers", _KIND)
    names = list(config.architectures or [])
    own = getattr(config, "auto_map", None) or {}
    with loading(f"the class of {path}"):
        result = getattr(transformers, names[0], None) if names else None
    if result is not None:
        return result
    key = next((text for text in own if text.startswith("AutoModel")), None)
    if key is not None:
        if not asked.trust_remote_code:
            raise CheckpointError(_remote(path, own))
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        with loading(f"the code of {path}"):
            return get_class_from_dynamic_module(own[key], path, local_files_only=True)
    if names:
        raise CheckpointError(
            f"{path} holds a {names[0]}, which transformers {transformers.__version__} lacks; install the version that "
            "has it"
        )
    mapping = transformers.AutoModel._model_mapping
    if type(config) not in mapping:
        raise CheckpointError(f"{path / 'config.json'} names no class in `architectures`; save it by save_pretrained")
    result = mapping[type(config)]
    return result[0] if isinstance(result, (list, tuple)) else result


@dataclass(frozen=True)
class Load:
    """Builds the model of a directory in the dtype that it is given. Raises: CheckpointError."""

    path: Path
    asked: Asked

    def __call__(self, dtype: torch.dtype) -> nn.Module:
        require_weights(self.path)  # half a checkpoint is told before anything is built
        require_room(self.path, dtype)
        entries, _ = read_checkpoint(self.path)
        kind = _class_of(self.path, config_of(self.path, self.asked), self.asked)
        with loading(f"{kind.__name__} of {self.path}"):
            model, seen = kind.from_pretrained(
                self.path,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=self.asked.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused here
            )
        shapes_that_differ(str(self.path), seen["mismatched_keys"])
        keys_left_out(str(self.path), seen["missing_keys"], entries)
        return model.eval()


# -------- its parts


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """What is run of it: one forward; of a model that generates also a step from its cache, one sample alone and in its
    batch, and a greedy generation.
    """
    config = config_of(recognised.path, asked)
    kind = _class_of(recognised.path, config, asked)
    if not _generates(kind, config):
        return (_FORWARD,)
    cached = _cache_name(kind) and not config.is_encoder_decoder and _takes_text_alone(kind)
    several = asked.batch > 1 and not asked.own_files
    return (_FORWARD, *((DECODE,) if cached else ()), *((BATCH,) if cached and several else ()), GENERATE)


def _generates(kind: type, config: Any) -> bool:
    return bool(getattr(kind, "can_generate", lambda: False)()) and (
        config.is_encoder_decoder or in_tables(kind, ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ"))
    )


def _takes_text_alone(kind: type) -> bool:
    return kind.main_input_name == "input_ids" and "pixel_values" not in _parameters(kind)


def in_tables(kind: type, tables: tuple[str, ...]) -> bool:
    """Whether a class is in one of these tables of transformers: "CAUSAL_LM", "MASKED_LM", …"""
    from transformers.models.auto import modeling_auto

    for table in tables:
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values()
        if any(kind.__name__ == name or (isinstance(name, tuple) and kind.__name__ in name) for name in names):
            return True
    return False


def arguments(recognised: Recognised, part: str, asked: Asked, *, processors: Path | None = None) -> dict[str, Any]:
    """The arguments of the Case that runs one part. `processors`: where the tokenizer is, if not beside the weights.

    Raises: CheckpointError.
    """
    config = config_of(recognised.path, asked)
    kind = _class_of(recognised.path, config, asked)
    draw = Draw(kind=kind, config=config, place=processors or recognised.path, part=part, asked=asked)
    given: dict[str, Any] = dict(model=Load(recognised.path, asked), inputs=draw, notes=draw.notes)
    if part == GENERATE:
        return given | dict(forward=generated, generates=("tokens", "logits"))
    if part == DECODE:
        return given | dict(forward=decoded, decisions="logits")
    if part == BATCH:
        return given | dict(forward=alone_and_together, alone=("alone", "together"))
    decides = in_tables(kind, DECIDING) and (getattr(config, "num_labels", 2) or 2) > 1
    reads = in_tables(kind, ("CAUSAL_LM",)) and _takes_text_alone(kind)
    given |= dict(next_tokens="input_ids") if decides and reads else {}
    given |= dict(forward=tokens_alone) if draw.pads else {}
    return given | (dict(decisions="logits") if decides else {})


def generated(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Greedy generation of `_STEPS` tokens: the tokens (B, T) and the logits (B, T, V) that each was taken from."""
    return greedy(model, inputs, _STEPS)


def alone_and_together(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The logits (1, T, V) of the first sample, run alone and in its batch."""
    first = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    alone, together = (without_padding({"logits": model(**given).logits}, given) for given in (first, inputs))
    return {"alone": alone["logits"], "together": together["logits"][:1]}


def decoded(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """One step from the cache: all tokens but the last fill it, the last is run alone. Returns its logits (B, 1, V)."""
    before = {name: input_[:, :-1] if isinstance(input_, Tensor) else input_ for name, input_ in inputs.items()}
    filled = model(**{**before, "use_cache": True})
    cache = next(filled[name] for name in CACHES if filled.get(name) is not None)
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model)  # of an adapter's model
    last = {name: _last(name, input_) for name, input_ in inputs.items()} | {
        "use_cache": True,
        _cache_name(kind): cache,
    }
    mask = {name: input_[:, -1:] for name, input_ in last.items() if name == "attention_mask"}
    return without_padding({"logits": model(**last).logits}, mask)


def _last(name: str, value: Any) -> Any:
    """What is given with the last token: its own column of ids, and all of the mask."""
    return value[:, -1:] if isinstance(value, Tensor) and name != "attention_mask" else value


def _cache_name(kind: type) -> str | None:
    """The argument of a model's forward that takes its cache; None where it has none, and for the state-space models of
    transformers 4, which ask for more than the cache.
    """
    known = _parameters(kind)
    if "cache_params" in known and "cache_position" in known:
        return None
    return next((name for name in CACHES if name in known), None)


# -------- its inputs


@functools.cache
def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draws the inputs of a model by the names that its forward takes, through the checkpoint's own processors."""

    kind: type
    config: Any
    place: Path  # where the tokenizer and the processors are
    part: str
    asked: Asked

    def __call__(self, generator: torch.Generator) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.takes_text and self.takes_pictures and self.processor("ProcessorMixin") is not None:
            given |= self._both(generator)
        else:
            self._require_no_places()
            given |= self._text(generator) if self.takes_text else {}
            given |= self._pictures(generator) if self.takes_pictures else {}
        given |= self._sound(generator) if self.takes_sound else {}
        given |= self._decoder(generator) if self._takes_decoder_ids else {}
        self._refuse_other_files()
        self._require_all(given)
        if self.part in (_FORWARD, BATCH) and "use_cache" in self.names:
            given["use_cache"] = False
        return given

    # -------- what is asked for

    @property
    def names(self) -> Mapping[str, inspect.Parameter]:
        return _parameters(self.kind)

    @property
    def main(self) -> str:
        return self.kind.main_input_name

    @property
    def takes_text(self) -> bool:
        many = self.main in ("input_ids", "pixel_values")
        return "input_ids" in self.names and many and (self.main == "input_ids" or hasattr(self.config, "text_config"))

    @property
    def pads(self) -> bool:
        """Whether the texts of a batch are filled up to one length, which a mask shows."""
        return self.takes_text and "attention_mask" in self.names

    @property
    def takes_pictures(self) -> bool:
        pictured = hasattr(self.config, "vision_config") or hasattr(self.config, "image_size")
        return "pixel_values" in self.names and (self.main == "pixel_values" or pictured)

    @property
    def takes_sound(self) -> bool:
        return self.main in ("input_values", "input_features") or (
            "input_features" in self.names and hasattr(self.config, "audio_config")
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report says of inputs that are not the checkpoint's own kind, and of those that are."""
        result = []
        if self.takes_text and not has_tokenizer(self.place):
            result.append("there is no tokenizer beside the weights: the token ids are drawn by seed")
        if self.takes_pictures and not self.has_processor("image_processor"):
            result.append("there is no image processor beside the weights: the pictures are noise, drawn by seed")
        if self.takes_sound and not self.has_processor("feature_extractor"):
            result.append("there is no feature extractor beside the weights: the sound is noise, drawn by seed")
        if self.pads and self.part != GENERATE:
            result.append(NOTE)
        return tuple(result)

    def has_processor(self, kind: str) -> bool:
        """Whether the directory has a processor of a kind: "image_processor" or "feature_extractor"."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (self.place / name).is_file():
                fields = read_config(self.place / name)
                if {f"{kind}_type", kind} & fields.keys() or (kind == "image_processor" and "image_mean" in fields):
                    return True
        return False

    def _refuse_other_files(self) -> None:
        """Raises: CheckpointError for a text, a picture or a recording that the model does not take."""
        taken = dict(text=self.takes_text, image=self.takes_pictures, audio=self.takes_sound)
        for name, takes in taken.items():
            if getattr(self.asked, name) is not None and not takes:
                other = ", ".join(f"--precision-{item}" for item, there in taken.items() if there) or "none of them"
                raise CheckpointError(
                    f"{self.kind.__name__} takes {self.main} and no {name}: leave --precision-{name} out; it takes "
                    f"{other}"
                )

    def _require_all(self, given: Mapping[str, Any]) -> None:
        """Raises: CheckpointError for an argument without a default that nothing was drawn for."""
        needed = [
            name
            for name, item in self.names.items()
            if item.default is item.empty
            and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
            and name != "self"
        ]
        absent = [name for name in needed if name not in given]
        if absent or not given:
            raise CheckpointError(f"{self.kind.__name__} takes {', '.join(absent) or self.main}, {BY_FUNCTION}")

    @property
    def _takes_decoder_ids(self) -> bool:
        """Whether the decoder is given tokens of its own: a classifier's are made of the encoder's."""
        alone = in_tables(self.kind, ("SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING"))
        return self.config.is_encoder_decoder and self.part != GENERATE and not alone

    def _require_no_places(self) -> None:
        """Raises: CheckpointError for a model whose pictures have places among the tokens and that has no processor."""
        marks = ("image_token_id", "image_token_index")
        if self.takes_text and self.takes_pictures and any(getattr(self.config, mark, None) for mark in marks):
            raise CheckpointError(
                f"{self.kind.__name__} takes pictures among its tokens, and {self.place} has no processor that puts "
                "them there; add processor_config.json and the tokenizer's files"
            )

    # -------- processors

    def processor(self, base: str) -> Any:
        """A processor of texts and pictures together, where the directory has one; else None."""
        if not (self.place / "processor_config.json").is_file() or not has_tokenizer(self.place):
            return None
        result = _loaded("AutoProcessor", self.place, self.asked)
        return result if any(item.__name__ == base for item in type(result).__mro__) else None

    def _tokenizer(self) -> Any:
        tokenizer = _loaded("AutoTokenizer", self.place, self.asked)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if self._decodes:
            tokenizer.padding_side = "left"
        return tokenizer

    @property
    def _decodes(self) -> bool:
        """Whether its tokens go on where the text ends, so that the padding is on the left."""
        return not self.config.is_encoder_decoder and _generates(self.kind, self.config)

    # -------- text

    @property
    def _text_config(self) -> Any:
        if not hasattr(self.config, "get_text_config"):
            return self.config
        try:
            return self.config.get_text_config()
        except ValueError:  # a model of several language models
            raise CheckpointError(f"{self.kind.__name__} has several text models, {BY_FUNCTION}") from None

    @property
    def length(self) -> int:
        """Tokens of a sequence: as asked, and no more than the model has positions for."""
        limits = [getattr(item, name, None) for item in (self.config, self._text_config) for name in _LENGTHS]
        known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
        room = 2 + (_STEPS if self.part == GENERATE else 0)  # some models count positions from 2 on
        return max(min([self.asked.length, *(item - room for item in known)]), 1)

    @property
    def vocabulary(self) -> int:
        result = getattr(self._text_config, "vocab_size", None) or getattr(self.config, "vocab_size", None)
        if not isinstance(result, int):
            raise CheckpointError(f"the config of {self.place} has no vocab_size, and no tokenizer is beside it")
        return result

    def _text(self, generator: torch.Generator) -> dict[str, Any]:
        if has_tokenizer(self.place):
            given = self._tokenized(texts(self.asked, generator), self.length)
        elif self.asked.text is not None:
            raise CheckpointError(f"{self.place} has no tokenizer, so --precision-text cannot be read; add its files")
        else:
            given = self._random_ids(generator)
        if in_tables(self.kind, ("MULTIPLE_CHOICE",)):  # (B, 2, N): each text beside another
            given = {name: torch.stack([argument, argument.flip(0)], 1) for name, argument in given.items()}
        return {name: argument for name, argument in given.items() if name in self.names or self._takes_all}

    @property
    def _takes_all(self) -> bool:
        return any(name.kind is name.VAR_KEYWORD for name in self.names.values()) and "input_ids" not in self.names

    def _tokenized(self, lines: list[str], length: int) -> dict[str, Tensor]:
        how = dict(padding=True, truncation=True, max_length=length, return_tensors="pt")
        with loading(f"the tokenizer of {self.place}"):
            tokenizer = self._tokenizer()
            result = tokenizer(lines, **(how | ({} if tokenizer.pad_token else dict(padding=False))))
        largest = int(result["input_ids"].max())
        if largest >= self.vocabulary:
            raise CheckpointError(
                f"the tokenizer of {self.place} gives the id {largest}, and the model has {self.vocabulary}: they do "
                "not belong together"
            )
        return dict(result)

    def _random_ids(self, generator: torch.Generator) -> dict[str, Tensor]:
        given = {"input_ids": ids(self.asked, generator, self.vocabulary, self.length, self._special_ids)}
        end = getattr(self._text_config, "eos_token_id", None)
        if self.config.is_encoder_decoder and isinstance(end, int) and 0 <= end < self.vocabulary:
            given["input_ids"][:, -1] = end  # some classifiers read what stands there
        if "attention_mask" in self.names:
            given["attention_mask"] = ragged_mask(self.asked.batch, self.length, left=self._decodes)
        return given

    @property
    def _special_ids(self) -> set[int]:
        """Ids that mean something to the model, such as the place of a picture."""
        result = {0, 1, 2} if self.vocabulary > 16 else set()
        for config in (self.config, self._text_config):
            named = {
                name: variable for name, variable in vars(config).items() if name.endswith(("token_id", "token_index"))
            }
            result |= {item for item in named.values() if isinstance(item, int)}
        return result

    def _decoder(self, generator: torch.Generator) -> dict[str, Tensor]:
        if "decoder_input_ids" not in self.names:
            return {}
        config = self._text_config
        vocabulary = getattr(config, "decoder_vocab_size", None) or self.vocabulary
        length = max(min(self.length // 2, (getattr(config, "max_target_positions", None) or 64) - 2), 1)
        given = ids(self.asked, generator, vocabulary, length, self._special_ids)
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, int) and 0 <= start < vocabulary:
            given[:, 0] = start
        return {"decoder_input_ids": given}

    # -------- pictures

    def _pictures(self, generator: torch.Generator) -> dict[str, Any]:
        vision = getattr(self.config, "vision_config", None) or self.config
        count = getattr(vision, "num_frames", None)
        if self.has_processor("image_processor"):
            with loading(f"the image processor of {self.place}"):
                processor = _loaded("AutoImageProcessor", self.place, self.asked)
                drawn = frames(self.asked, generator, count) if count else pictures(self.asked, generator)
                result = dict(processor(drawn, return_tensors="pt"))
            return {name: item for name, item in result.items() if name in self.names}
        if self.asked.image is not None:
            raise CheckpointError(
                f"{self.place} has no preprocessor_config.json, so --precision-image cannot be prepared; add it"
            )
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = (getattr(vision, "num_channels", None) or 3, height, width)
        batch = (self.asked.batch, count) if count else (self.asked.batch,)
        return {"pixel_values": torch.randn(*batch, *shape, generator=generator)}

    def _both(self, generator: torch.Generator) -> dict[str, Any]:
        """Texts and pictures through one processor, with the token that stands for a picture where there is one."""
        with loading(f"the processor of {self.place}"):
            processor = self.processor("ProcessorMixin")
            if self._decodes and getattr(processor, "tokenizer", None) is not None:
                processor.tokenizer.padding_side = "left"
            lines, drawn = texts(self.asked, generator), pictures(self.asked, generator)
            lines = (lines * len(drawn))[: len(drawn)] if len(lines) < len(drawn) else lines[: len(drawn)]
            mark = getattr(processor, "image_token", None)
            lines = [f"{mark}\n{line}" if mark else line for line in lines]
            result = dict(processor(text=lines, images=drawn, padding=True, return_tensors="pt"))
        return {name: item for name, item in result.items() if name in self.names}

    # -------- sound

    def _sound(self, generator: torch.Generator) -> dict[str, Any]:
        if self.has_processor("feature_extractor"):
            with loading(f"the feature extractor of {self.place}"):
                extractor = _loaded("AutoFeatureExtractor", self.place, self.asked)
                rate = extractor.sampling_rate
                drawn = [sound.numpy() for sound in sounds(self.asked, generator, rate)]
                result = dict(extractor(drawn, sampling_rate=rate, return_tensors="pt"))
            return {name: item for name, item in result.items() if name in self.names}
        if self.asked.audio is not None:
            raise CheckpointError(
                f"{self.place} has no preprocessor_config.json, so --precision-audio cannot be prepared; add it"
            )
        name = "input_features" if "input_features" in self.names else "input_values"
        return {name: torch.randn(self.asked.batch, *self._sound_shape(), generator=generator)}

    def _sound_shape(self) -> tuple[int, ...]:
        """The shape of one sound, as the sizes in the config tell: features, or a tenth of a second of samples."""
        config = getattr(self.config, "audio_config", None) or self.config
        size = lambda name: getattr(config, name, None)  # noqa: E731
        if size("max_source_positions") and size("num_mel_bins"):  # Whisper: two frames become one position
            return (size("num_mel_bins"), 2 * size("max_source_positions"))
        if size("max_length") and size("num_mel_bins") and size("frequency_stride"):  # the spectrogram transformer
            return (size("max_length"), size("num_mel_bins"))
        if size("spec_size"):  # CLAP
            return (1, size("spec_size") * 4, size("num_mel_bins"))
        if size("input_feat_per_channel"):
            return (64, size("input_feat_per_channel"))
        if size("feature_projection_input_dim"):
            return (64, size("feature_projection_input_dim"))
        samples = (size("sampling_rate") or 16000) // 10
        return (size("audio_channels"), samples) if size("audio_channels") else (samples,)


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return any((path / name).is_file() for name in TOKENIZERS)


@functools.lru_cache(maxsize=8)
def _loaded(kind: str, path: Path, asked: Asked) -> Any:
    """A processor of a directory, by one of transformers' Auto classes. Raises: CheckpointError."""
    transformers = library("transformers", _KIND)
    with loading(f"the {PROCESSORS[kind]} of {path}"):
        return getattr(transformers, kind).from_pretrained(
            path, trust_remote_code=asked.trust_remote_code, local_files_only=True
        )
