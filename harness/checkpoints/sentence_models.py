"""Checkpoints of sentence-transformers: the embedding of each text, and which texts are the nearest to it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.checkpoints.libraries import library, loading
from harness.checkpoints.material import Asked, pictures, texts
from harness.checkpoints.padding import NOTE, without_padding
from harness.checkpoints.recognition import Recognised
from harness.checkpoints.weights import require_weights
from harness.errors import CheckpointError

_KIND = "sentence-transformers"
_FORWARD, RETRIEVAL = "forward", "retrieval"
_RETRIEVED = 24  # texts of a retrieval, each of which is searched for among the others


def parts(recognised: Recognised, asked: Asked) -> tuple[str, ...]:
    """The embeddings, and the order in which texts retrieve one another; of a user's own files the embeddings alone."""
    return (_FORWARD,) if asked.own_files else (_FORWARD, RETRIEVAL)


def arguments(recognised: Recognised, part: str, asked: Asked) -> dict[str, Any]:
    """The arguments of the Case that embeds texts, or that compares their embeddings with one another."""
    model = Load(recognised.path, asked)
    if part == RETRIEVAL:
        draw = Draw(recognised.path, asked, texts=max(asked.batch, _RETRIEVED))
        return dict(model=model, inputs=draw, forward=similarities, decisions="similarity")
    return dict(model=model, inputs=Draw(recognised.path, asked), forward=embedding, notes=(NOTE,))


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, asked: Asked) -> nn.Module:
    """The model in float32: its first module tokenizes, so the inputs need it too."""
    library("transformers", _KIND)
    sentence_transformers = library("sentence_transformers", _KIND)
    require_weights(path)
    with loading(f"the sentence-transformers model of {path}"):
        return sentence_transformers.SentenceTransformer(
            str(path),
            device="cpu",
            trust_remote_code=asked.trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        ).eval()


@dataclass(frozen=True)
class Load:
    """Builds the model of a directory in float32. Raises: CheckpointError."""

    path: Path
    asked: Asked

    def __call__(self) -> nn.Module:
        return _loaded(self.path, self.asked)


@dataclass(frozen=True)
class Draw:
    """Texts, tokenized by the model's own first module; `texts` of them, None: as many as a batch has.

    Raises: CheckpointError.
    """

    path: Path
    asked: Asked
    texts: int | None = None

    def __call__(self, generator: torch.Generator) -> dict[str, Any]:
        model = _loaded(self.path, self.asked)
        pictured = self.asked.image is not None
        if self.asked.audio is not None or (pictured and not _takes_pictures(model)):
            raise CheckpointError(f"{self.path} embeds texts: leave --precision-image and --precision-audio out")
        asked = self.asked if self.texts is None else replace(self.asked, batch=self.texts)
        lines = pictures(asked, generator) if pictured else texts(asked, generator)
        with loading(f"the tokenizer of {self.path}"):
            limit = model.max_seq_length
            if limit is None or limit > self.asked.length:
                model.max_seq_length = self.asked.length
            result = (getattr(model, "preprocess", None) or model.tokenize)(lines)
            model.max_seq_length = limit
        return {name: item for name, item in result.items() if item is not None}


def _takes_pictures(model: nn.Module) -> bool:
    return "image" in (getattr(model, "modalities", None) or ())


def embedding(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The embeddings (B, D) of texts, and those of their tokens (B, N, D) where the model gives them."""
    result = model(dict(inputs))
    names = ("sentence_embedding", "token_embeddings")
    return without_padding({name: result[name] for name in names if isinstance(result.get(name), Tensor)}, inputs)


def similarities(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The cosine similarity (B, B - 1) of each text to all the others, the nearest of which is what it retrieves.

    The similarity of a text to itself, the diagonal of the (B, B) products, is left out: it would be the largest.
    """
    vectors = functional.normalize(model(dict(inputs))["sentence_embedding"], dim=-1)
    products = vectors @ vectors.T
    count = len(products)
    others = products.flatten()[1:].view(count - 1, count + 1)[:, :-1]
    return {"similarity": others.reshape(count, count - 1)}
