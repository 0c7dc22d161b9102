"""What a checkpoint's own files say of it: task, architecture, licence, languages, citation. Nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoints.recognition import Recognised
from harness.errors import HarnessError

_LONGEST = 1 << 20  # bytes of a README that are read


@dataclass(frozen=True, kw_only=True)
class Stated:
    """Something that a card says, or why it does not: a key of the words of cards in `harness.languages`."""

    value: Any = None
    why: str = ""

    @property
    def known(self) -> bool:
        return not self.why


def stated(value: Any, why: str) -> Stated:
    """The value, or where there is none the reason."""
    return Stated(why=why) if value in (None, "", [], {}, ()) else Stated(value=value)


_TASKS = {  # the tables of transformers and the hub's pipeline tags of their classes
    "CAUSAL_LM": "text-generation",
    "MASKED_LM": "fill-mask",
    "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",
    "SPEECH_SEQ_2_SEQ": "automatic-speech-recognition",
    "CTC": "automatic-speech-recognition",
    "SEQUENCE_CLASSIFICATION": "text-classification",
    "TOKEN_CLASSIFICATION": "token-classification",
    "QUESTION_ANSWERING": "question-answering",
    "MULTIPLE_CHOICE": "multiple-choice",
    "IMAGE_CLASSIFICATION": "image-classification",
    "VIDEO_CLASSIFICATION": "video-classification",
    "AUDIO_CLASSIFICATION": "audio-classification",
    "OBJECT_DETECTION": "object-detection",
    "ZERO_SHOT_OBJECT_DETECTION": "zero-shot-object-detection",
    "SEMANTIC_SEGMENTATION": "image-segmentation",
    "INSTANCE_SEGMENTATION": "image-segmentation",
    "UNIVERSAL_SEGMENTATION": "image-segmentation",
    "DEPTH_ESTIMATION": "depth-estimation",
    "MASK_GENERATION": "mask-generation",
    "IMAGE_TEXT_TO_TEXT": "image-text-to-text",
    "ZERO_SHOT_IMAGE_CLASSIFICATION": "zero-shot-image-classification",
    "IMAGE_TO_IMAGE": "image-to-image",
}
_OF_INPUTS = {"pixel_values": "image-feature-extraction", "input_values": "audio-feature-extraction"}
_LIBRARIES = {
    "transformers": "transformers",
    "sentence-transformers": "sentence-transformers",
    "PEFT": "peft",
    "diffusers": "diffusers",
    "timm": "timm",
    "AIMv2": "pytorch",
    "torch.export": "pytorch",
    "TorchScript": "pytorch",
    "function": "pytorch",
}
_LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "NOTICE", "USE_POLICY.md")


def library_of(recognised: Recognised) -> str:
    """The hub's name of the library that loads the checkpoint."""
    return _LIBRARIES[recognised.kind]


def task_of(recognised: Recognised, kind: type | None, main_input: str, front: Mapping[str, Any]) -> str | None:
    """The hub's pipeline tag: what the README says, else the table of transformers that has the class, else what the
    input is.
    """
    if isinstance(front.get("pipeline_tag"), str):
        return front["pipeline_tag"]
    if recognised.kind == "sentence-transformers":
        return "sentence-similarity"
    if recognised.kind == "AIMv2":
        return "image-feature-extraction"
    if recognised.kind == "timm":
        return "image-classification" if recognised.fields.get("num_classes") else "image-feature-extraction"
    if kind is None or recognised.kind not in ("transformers", "PEFT"):
        return None
    from harness.checkpoints.transformers_models import in_tables

    for table, task in _TASKS.items():
        if in_tables(kind, (table,)):
            return task
    return _OF_INPUTS.get(main_input, "feature-extraction")


def readme_of(path: Path) -> tuple[Mapping[str, Any], str]:
    """The front matter and the text of the README in a directory; empty where there is none, or it cannot be read."""
    file = path / "README.md"
    try:
        text = file.read_bytes()[:_LONGEST].decode("utf-8", errors="replace") if file.is_file() else ""
    except OSError:
        return {}, ""
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if match is None:
        return {}, text
    yaml = required("yaml")
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        front = None
    return (front if isinstance(front, dict) else {}), text[match.end() :]


def licence_of(path: Path, front: Mapping[str, Any]) -> str | None:
    """The licence as the checkpoint says it: the README's, else the file that holds one."""
    named = front.get("license_name") or front.get("license")
    if isinstance(named, list):
        named = ", ".join(map(str, named))
    if named:
        return str(named)
    return next((name for name in _LICENCE_FILES if (path / name).is_file()), None)


def citation_of(text: str) -> str | None:
    """The first BibTeX entry of a README."""
    match = re.search(r"^@\w+\s*\{.*?^\s*\}", text, re.MULTILINE | re.DOTALL)
    return None if match is None else match[0].strip()


AIMV2_CITATION = """@misc{fini2024multimodal,
  author = {Fini, Enrico and Shukor, Mustafa and Li, Xiujun and others},
  title = {Multimodal Autoregressive Pre-training of Large Vision Encoders},
  year = {2024},
  eprint = {2411.14402},
  archivePrefix = {arXiv},
}"""


def required(name: str) -> Any:
    """A library of the extra `card`. Raises: HarnessError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"yaml": "pyyaml"}.get(name, name)
        raise HarnessError(
            f"a card needs {package}, which is not installed; pip install 'npu-accuracy-harness[card]'"
        ) from None
