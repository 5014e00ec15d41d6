"""Learning from samples of several sizes: padding counts nowhere, and pieces of a batch add up to the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantkit import Result
from quantkit.errors import InvalidRequest
from quantkit.program.segments import whole
from quantkit.reconstruction import data as learned_from
from quantkit.reconstruction.block_error import PositionError
from quantkit.reconstruction.data import pieces
from quantkit.reconstruction.learned import LearnedWeight
from quantkit.reconstruction.learning import LearningOptions, Schedule
from quantkit.session import Session
from quantkit.simulation import playback
from quantkit.simulation.playback import SimulatedProgram, differentiated_at_once, played_at_once
from quantkit.stages.inputs import TOKENS, Inputs, calibration_batches
from quantkit.targets import Target
from tests.program.architectures import ARCHITECTURES
from tests.program.test_padding import Encoder
from tests.stages.schedules import apply_with

WORDS, WIDTH = 30, 8
SHORT = LearningOptions(
    positions_block=Schedule(batch=8, code_rate=2e-2, scale_rate=2e-3, epochs=4),
    positions_network=Schedule(batch=8, code_rate=0.0, scale_rate=1e-3, epochs=1),
)


class Tagger(nn.Module):
    """Two encoders of words, and scores of four classes for every word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.one, self.two = Encoder(), Encoder()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        x, hidden = self.words(words), attention_mask[:, None, None, :] == 0
        for layer in (self.one, self.two):
            q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
            mixed = (q @ k.transpose(-2, -1)).masked_fill(hidden, -1e9).softmax(-1) @ v
            x = x + layer.out(mixed.transpose(1, 2).flatten(2))
            x = x + layer.down(layer.up(layer.norm(x)).relu())
        return self.head(x)


def tagger() -> nn.Module:
    torch.manual_seed(0)
    return Tagger().eval()


def padded(lengths: list[int], length: int, filler: int = 0, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    words, mask = torch.full((len(lengths), length), filler), torch.zeros(len(lengths), length, dtype=torch.long)
    for i, own in enumerate(lengths):
        words[i, :own] = torch.randint(1, WORDS, (own,), generator=draws)
        mask[i, :own] = 1
    return {"words": words, "attention_mask": mask}


def several() -> list[dict[str, Tensor]]:
    return [padded([4, 5, 3, 5] * 8, 5), padded([7, 5, 2, 6] * 8, 7, seed=1)]


LAYERS = [f"{layer}.{name}" for layer in ("one", "two") for name in ("qkv", "out", "up", "down")]


def learned(data: Any, scheme: str = "w2g4z", how: str = "block", **options: Any) -> Result:
    plan = dict.fromkeys(LAYERS, scheme)
    return apply_with(SHORT, tagger(), plan, data, reconstruction=how, correction=None, **options)


def codes_of(result: Result) -> dict[str, Tensor]:
    return {name: weight.dequantize() for name, weight in result.quantized.weights.items()}


@pytest.mark.parametrize("scheme", ["w2g4z", "w3g4", "w3"])
def test_blocks_are_learned_from_sentences_of_several_lengths(scheme: str) -> None:
    notes = learned(several(), scheme, rounding="gptq").notes["reconstruction"]
    assert notes["all blocks"].after < notes["all blocks"].before
    assert len(notes) == 4  # two pairs of blocks, all of them, and the network


def test_a_length_of_which_no_sample_is_held_back_is_learned_from_too() -> None:
    rare = [padded([4, 5, 3, 5] * 16, 5), padded([8], 8)]
    assert learned(rare).notes["reconstruction"]["all blocks"].after > 0


def test_what_padding_holds_changes_no_code() -> None:
    """And each run repeats itself."""
    found = [codes_of(learned([padded([4, 5, 3, 5] * 16, 6, filler)])) for filler in (0, 0, 17)]
    for other in found[1:]:
        assert all(torch.equal(weight, other[name]) for name, weight in found[0].items())


def test_layer_by_layer_needs_one_size() -> None:
    with pytest.raises(InvalidRequest, match="learns from samples of one size, and the calibration data has 2"):
        learned(several(), how="adaquant")


def test_outputs_that_are_not_held_teach_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    held = codes_of(learned(several()))
    monkeypatch.setattr(learned_from, "HELD_BYTES", 0)
    again = codes_of(learned(several()))
    assert all(torch.allclose(weight, again[name], atol=1e-6) for name, weight in held.items())


def test_pieces_name_every_sample_of_a_batch_once() -> None:
    counts, indices = [5, 3, 9], torch.randperm(17, generator=torch.Generator().manual_seed(0))[:11]
    starts, found = [0, 5, 8], []
    for size, own in pieces(counts, [2, 10, 3], indices):
        assert len(own) <= [2, 10, 3][size] and int(own.max()) < counts[size]
        found += (own + starts[size]).tolist()
    assert sorted(found) == sorted(indices.tolist())


def simulated() -> tuple[SimulatedProgram, dict[int, Tensor]]:
    """A tagger whose weights are being learned, and inputs of its program."""
    data = padded([4, 5, 3, 5] * 4, 5)
    result = learned([data], how="none")
    session = Session.open(tagger(), Inputs.of(tagger(), [data], None, None), Target.load("onnxruntime-cpu"))
    assert not isinstance(session.replay, str)
    runner = SimulatedProgram(result.quantized, session.replay.program)
    for name in LAYERS:
        weight, unit = session.prepared.weights[name], torch.ones(1)
        runner.weights[name] = LearnedWeight(weight, result.quantized.weights[name], None, unit)
    return runner, session.replay.program.entering(session.prepared.model, session.replay.samples[0])


def test_gradients_of_pieces_with_shared_weights_are_those_of_the_batch() -> None:
    runner, values = simulated()
    codes = [weight.code for weight in runner.weights.values()]
    runner.output(values).square().mean().backward()
    wanted = [code.grad.clone() for code in codes]
    for code in codes:
        code.grad = None
    with runner.sharing_weights():
        for which in torch.arange(16).split(5):
            part = playback.take(runner.program, values, which)
            (runner.output(part).square().mean() * len(which) / 16).backward()
    for code, grad in zip(codes, wanted, strict=True):
        assert torch.allclose(code.grad, grad, atol=1e-7) and float(grad.abs().max()) > 0


def test_errors_under_padding_do_not_count() -> None:
    data = padded([4, 5, 3, 5], 6)
    model = tagger()
    session = Session.open(model, Inputs.of(model, [data], None, None), Target.load("onnxruntime-cpu"))
    replay, padding = session.replay, session.prepared.padding
    assert not isinstance(replay, str) and padding is not None
    inputs = replay.program.entering(session.prepared.model, replay.samples[0])
    found, wanted = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    error = float(PositionError(replay.program.output, padding)(found, wanted, inputs))
    live = data["attention_mask"].bool().numpy()
    ours, theirs = found.numpy()[live], wanted.numpy()[live]
    assert error == pytest.approx(float(np.square(ours - theirs).mean() / np.square(theirs).mean()), rel=1e-5)


def test_long_sequences_are_played_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ARCHITECTURES["llama"]
    model = entry.build()
    args, kwargs = entry.batch(8)
    session = Session.open(model, Inputs.of(model, [kwargs or args], None, None), Target.load("onnxruntime-cpu"))
    assert not isinstance(session.replay, str)
    program = session.replay.program
    largest = max(x for n in program.rows if (x := 4 * np.prod(program.shape[n]) / program.size))
    monkeypatch.setattr(playback, "CHUNK_BYTES", int(5 * largest))
    assert played_at_once(program) == 5 and played_at_once(program, 2.0) == 2 and played_at_once(program, 99.0) == 1
    monkeypatch.setattr(playback, "CHUNK_BYTES", 1 << 40)
    assert played_at_once(program) == playback.CHUNK
    every = differentiated_at_once(program, whole(program))
    monkeypatch.setattr(playback, "GRAPH_BYTES", playback.GRAPH_BYTES // 4)
    assert differentiated_at_once(program, whole(program)) == pytest.approx(every / 4, abs=1)


def test_batches_of_tokens_are_bounded() -> None:
    words = torch.randint(0, WORDS, (300, TOKENS // 16))
    data = {"words": words, "attention_mask": torch.ones_like(words)}
    sizes = [len(kwargs["words"]) for _, kwargs in calibration_batches(tagger(), data, None)]
    assert max(sizes) == 16 and sum(sizes) == 300
