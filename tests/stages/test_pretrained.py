"""Quantized models of transformers as folders that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2}


def tokens(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": (torch.arange(9) < 9 - torch.arange(4)[:, None]).long()}


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=4)).eval()


def quantized(model: nn.Module, budget: str = "w4", **options: object) -> quantkit.Result:
    return quantkit.quantize(model, budget, [tokens()], progress=False, rounding="nearest", **options)


@pytest.mark.parametrize("name", ["llama", "tied llama", "bf16 llama", "bert"])
@torch.no_grad()
def test_what_is_loaded_computes_what_was_quantized(name: str, tmp_path: Path) -> None:
    made = {"llama": llama, "tied llama": lambda: llama(tied=True), "bf16 llama": lambda: llama(dtype=torch.bfloat16)}
    model = made.get(name, bert)()
    result = quantized(model)
    assert result.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    kind = transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "saved", local_files_only=True).eval()
    unseen = tokens(seed=1)
    labels = torch.tensor([0, 1, 2, 3]) if name == "bert" else unseen["input_ids"]
    found, wanted = (m(**unseen, labels=labels) for m in (loaded, result.model))
    close = 1e-3 if "bf16" in name else 1e-5  # frequencies of positions, cast with the rest, are made anew in float32
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=close)
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=close)
    assert not torch.allclose(found.logits, model.float()(**unseen).logits, atol=1e-3)
    assert json.loads((tmp_path / "saved" / "plan.json").read_text())["schemes"]

    like = made[name]() if "bf16" in name else loaded  # of its type, whose frequencies no file holds
    codes = quantkit.load(tmp_path / "saved", model=like)
    assert torch.equal(codes.model(**unseen).logits, result.model(**unseen).logits)


def test_tokenizers_lie_beside_and_other_files_stay(tmp_path: Path) -> None:
    from tests.program.test_texts import of_transformers

    (tmp_path / "notes.txt").write_text("mine")
    quantized(llama()).save_pretrained(tmp_path, tokenizer=of_transformers(pad_token="[PAD]"))
    known = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert known("a cat").input_ids[0] == 1 and (tmp_path / "notes.txt").read_text() == "mine"
    assert not [file for file in tmp_path.parent.iterdir() if file.name.endswith(".tmp")]


def test_a_loaded_result_can_be_saved_too(tmp_path: Path) -> None:
    quantized(llama()).save(tmp_path / "codes")
    quantkit.load(tmp_path / "codes", model=llama()).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()


class Rebuilding(transformers.LlamaForCausalLM):
    """Reads its weights another way than it writes them."""

    @classmethod
    def from_pretrained(cls, *args: object, **options: object) -> nn.Module:
        found = super().from_pretrained(*args, **options)
        found.lm_head.weight.data.mul_(2)
        return found


def with_norm() -> quantkit.Result:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    images = {"pixel_values": torch.randn(4, 3, 16, 16)}
    model = transformers.ResNetForImageClassification(config).eval()
    return quantkit.quantize(model, "w8", [images], progress=False, rounding="nearest")


def plain() -> quantkit.Result:
    return quantkit.quantize(nn.Sequential(nn.Linear(4, 4)), "w8", [torch.randn(4, 4)], progress=False)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: quantized(llama(), "w8a8"), "would compute with float activations: .* have codes"),
        (lambda: quantized(llama(), "w8a8d"), "would compute with float activations: .* have codes"),
        (with_norm, "was folded into"),
        (plain, "Sequential has no save_pretrained"),
        (lambda: quantized(Rebuilding(llama().config)), "does not compute what the quantized model does"),
    ],
    ids=["static", "token by token", "folded", "not of transformers", "rebuilt"],
)
def test_what_would_compute_something_else_is_refused(make, told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=told):
        make().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists() or not any((tmp_path / "saved").iterdir())
