"""Which tensors of a result count, by what loss, and which of their rows are padding."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.program.outputs import counted, main_output
from quantkit.sensitivity.outputs import OutputRule


class Plain(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x


class EncoderDecoder(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor) -> Tensor:
        return x


@dataclass
class Detection:
    cls_logits: Tensor
    boxes: Tensor
    hidden_states: tuple[Tensor, ...] = ()


def rule_of(result: Any, loss: str = "auto", **inputs: Tensor) -> OutputRule:
    return OutputRule.of(Plain(), result, ((), inputs), loss)


SCORES, BOXES = torch.randn(6, 5), torch.randn(6, 4)
MAPS = torch.randn(2, 5, 3, 3)
HIDDEN = (torch.randn(6, 7), torch.randn(6, 7))
Pair = namedtuple("Pair", ["logits", "boxes"])


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (SCORES, "KL of output (5 classes)"),
        (BOXES[:, :1], "relative squared error of output"),
        ((SCORES,), "KL of output[0] (5 classes)"),
        ({"scores": SCORES}, "KL of scores (5 classes)"),
        ((SCORES, BOXES), "relative squared error of output[0] + relative squared error of output[1]"),
        ({"logits": SCORES, "boxes": BOXES}, "KL of logits (5 classes) + relative squared error of boxes"),
        (Pair(SCORES, BOXES), "KL of logits (5 classes) + relative squared error of boxes"),
        ({"class": MAPS, "boxes": BOXES}, "relative squared error of class + relative squared error of boxes"),
        ([{"boxes": BOXES}, torch.ones(2)], "relative squared error of output[0].boxes + "
         "relative squared error of output[1]"),
        (Detection(SCORES, BOXES, HIDDEN), "KL of cls_logits (5 classes) + relative squared error of boxes"),
        ({"loss": torch.ones(()), "logits": SCORES, "past_key_values": HIDDEN}, "KL of logits (5 classes)"),
        (OrderedDict(logits=SCORES, last_hidden_state=HIDDEN[0]), "KL of logits (5 classes)"),
        ({"last_hidden_state": SCORES, "pooler_output": BOXES, "hidden_states": HIDDEN},
         "relative squared error of last_hidden_state + relative squared error of pooler_output"),
        ({"hidden_states": (SCORES,)}, "KL of hidden_states[0] (5 classes)"),
        ((torch.ones(2, dtype=torch.long), SCORES), "KL of output[1] (5 classes)"),
        ({"score_logits": BOXES[:, :1], "boxes": BOXES}, "relative squared error of score_logits + "
         "relative squared error of boxes"),
    ],
)  # fmt: skip
def test_rule_says_in_one_line_what_is_compared_and_how(result: Any, text: str) -> None:
    rule = rule_of(result)
    assert str(rule) == text
    assert json.loads(json.dumps(rule.record()))["outputs"][0]["name"] == rule.outputs[0].name


def test_a_loss_that_is_asked_for_holds_for_all_outputs() -> None:
    two, one = (SCORES, BOXES), BOXES[:, :1]
    assert [o.loss for o in rule_of(two, "kl").outputs] == ["kl", "kl"]
    assert [o.loss for o in rule_of({"logits": SCORES, "boxes": BOXES}, "mse").outputs] == ["mse", "mse"]
    assert [o.loss for o in rule_of((SCORES, one), "kl").outputs] == ["kl", "mse"]  # one class is no distribution
    assert rule_of(one, "kl").outputs[0].loss == "kl"
    with pytest.raises(InvalidRequest, match=r"Unknown loss 'huber'; known: auto, kl, mse"):
        rule_of(two, "huber")


def test_answer_is_the_logits_else_the_first_float_tensor() -> None:
    assert main_output({"hidden": BOXES, "logits": SCORES}) is SCORES
    assert main_output(namedtuple("Output", ["hidden", "logits"])(BOXES, SCORES)) is SCORES
    assert main_output((torch.ones(2, dtype=torch.long), [BOXES])) is BOXES
    assert rule_of({"hidden": BOXES, "logits": SCORES}).answer.name == "logits"
    with pytest.raises(InvalidRequest, match="no floating-point tensor"):
        main_output((torch.ones(2, dtype=torch.long),))


def test_an_output_that_another_batch_lacks_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"returns logits for a calibration batch.*also returned boxes"):
        rule_of({"logits": SCORES, "boxes": BOXES}).tensors({"logits": SCORES})


MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("named", [True, False])
def test_rows_under_padding_are_left_out_also_where_the_mask_has_no_name(kind: torch.dtype, named: bool) -> None:
    tokens, mask = torch.randn(3, 3, 5), MASK.to(kind)
    batch: Any = ((tokens,), {"attention_mask": mask}) if named else ((tokens, mask), {})
    rule = OutputRule.of(Plain(), (tokens, tokens.mean(1)), batch, "auto")
    assert [o.padded for o in rule.outputs] == [True, False]
    assert "attention_mask" in str(rule)
    live, pooled = rule.rows((tokens, tokens.mean(1)), batch)
    assert torch.equal(live, torch.stack([tokens[n, t] for n in range(3) for t in range(3) if MASK[n, t]]))
    assert torch.equal(pooled, tokens.mean(1))
    samples = rule.samples([batch, batch], [[6, 3], [6, 3]])
    assert samples[0].tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 5]
    assert samples[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_mask_of_other_positions_or_of_the_encoder_masks_nothing() -> None:
    tokens = torch.randn(3, 3, 5)
    other = rule_of(tokens, attention_mask=torch.ones(3, 7))
    assert other.mask is None and not other.outputs[0].padded
    additive = rule_of(tokens, attention_mask=-1e9 * (1.0 - MASK))
    assert additive.mask is None
    encoder: Any = ((tokens, MASK), {"decoder_attention_mask": torch.ones(3, 3)})
    rule = OutputRule.of(EncoderDecoder(), tokens, encoder, "auto")
    assert len(rule.rows(tokens, encoder)[0]) == 9


def test_transformers_outputs_count_their_logits_alone() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(8).reshape(2, 4)
    result = model(input_ids=ids, labels=ids, output_hidden_states=True, output_attentions=False)
    assert [name for name, _ in counted(result)] == ["logits"]
    bare = transformers.GPT2Model(config).eval()(input_ids=ids, output_hidden_states=True)
    assert [name for name, _ in counted(bare)] == ["last_hidden_state"]
