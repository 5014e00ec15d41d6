"""What rounding and learning hold is announced, and bounded: values past a size go to disk."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantkit
from quantkit.errors import InvalidRequest
from quantkit.formats import WeightFormat
from quantkit.program.layers import LayerWeight
from quantkit.program.segments import whole
from quantkit.rounding.request import RoundingOptions
from quantkit.simulation import playback
from quantkit.simulation.playback import copied_state, float_program, play_output, room_for
from quantkit.stages.footprint import rounding_bytes
from quantkit.stages.formatted import Formatted
from quantkit.stages.recording import Recording, Replay, recording_of, replay_of
from quantkit.stages.working_memory import Learning, working_memory
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.stages.networks import images, small
from tests.stages.test_reconstruct import SMALL, apply


def formatted(ready: Prepared, bits: str = "4") -> Formatted:
    """A prepared model whose layers all get weights of so many bits."""
    return Formatted(ready, dict.fromkeys(ready.quantizable, WeightFormat(bits)), {}, ())


def recorded(x: Tensor) -> tuple[Prepared, Recording]:
    batch = ((x,), {})
    ready = prepare(small(), [batch], Target.load("onnxruntime-cpu"))
    replay = replay_of(ready, [batch])
    assert isinstance(replay, Replay)
    return ready, recording_of(ready, replay)


def test_the_figures_of_a_small_network_by_hand() -> None:
    ready, recording = recorded(images(40))
    assert len(recording.blocks) == 1
    inputs, logits, value = 4 * 2 * 6 * 6, 4 * 10, 4 * 12 * 6 * 6
    rounding = working_memory(formatted(ready), recording, 40, Learning(), RoundingOptions())
    assert rounding.values == 40 * 2 * value  # before "mix": what it reads, and what is added behind it
    learning = working_memory(formatted(ready), recording, 40, Learning(100, 200), RoundingOptions())
    assert learning.values == 100 * inputs + 200 * (2 * inputs + 3 * logits)
    assert (rounding.drawing, learning.drawing) == (0, 9 * 40 * inputs)
    state = sum(t.numel() * t.element_size() for t in ready.model.state_dict().values())
    assert (rounding.copies, learning.copies) == (2 * state, 9 * state)

    # the second convolution: its sum and a product, its input padded and turned, its columns, and three values
    hessian, columns = 8 * 108**2, 4 * 40 * 36 * 108
    assert rounding.hessian == int(2.5 * hessian) + 2 * 40 * value + columns + 2 * 3 * 40 * value
    assert rounding.peak_bytes == rounding.values + rounding.hessian + rounding.copies
    assert rounding.ranges == 2 * (3 + 7) * 40 * value
    program = recording.program
    made = sum(torch.Size(program.shape[number][1:]).numel() for number in program.producer)
    assert learning.graph == 2 * 2 * 4 * 40 * made


def test_values_that_follow_the_number_of_samples_alone_are_held_too() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[0], 4)
            return self.two(self.one(x + mask).relu() + mask)

    batch = ((torch.randn(6, 4),), {})
    ready = prepare(Masked().eval(), [batch], Target.load("onnxruntime-cpu"))
    replay = replay_of(ready, [batch])
    assert isinstance(replay, Replay)
    found = working_memory(formatted(ready), recording_of(ready, replay), 6, Learning(), RoundingOptions())
    assert found.values == 6 * 2 * (4 * 4)  # what a layer reads, and the mask that is read behind it


def test_rounding_without_inputs_holds_no_hessian() -> None:
    ready, recording = recorded(images(40))
    nearest = working_memory(formatted(ready), recording, 40, Learning(), RoundingOptions("nearest"))
    assert nearest.hessian == 4 * 8 * 12 * 108


def test_eight_bits_of_a_wide_layer_are_announced_in_blocks() -> None:
    batch = ((torch.rand(8, 3000),), {})
    ready = prepare(nn.Sequential(nn.Linear(3000, 4)), [batch], Target.load("onnxruntime-cpu"))
    replay = replay_of(ready, [batch])
    assert isinstance(replay, Replay)
    recording = recording_of(ready, replay)
    four, eight = (
        working_memory(formatted(ready, bits), recording, 8, Learning(), RoundingOptions()).hessian for bits in "48"
    )
    assert four == 6 * 8 * 3000**2
    assert eight == 3 * 6 * 8 * 500**2 + 4 * 5 * 17 * 4 * 3000  # sums and factors of six blocks, and what is tried


def test_blocks_hold_less_than_the_whole() -> None:
    weight = LayerWeight("linear", (8, 4096), "w")
    whole = rounding_bytes(weight, RoundingOptions())
    assert whole == 6 * 8 * 4096**2
    blocks = rounding_bytes(weight, RoundingOptions(hessian_bytes=8 * 4096 * 512))
    assert blocks == 3 * 8 * 4096 * 512 + 4 * 5 * 17 * 8 * 4096


def test_layers_are_rounded_in_blocks_within_the_memory_given(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(600, 4)).eval(), torch.randn(32, 600)
    whole, limited, least = (
        quantkit.apply(model, {"0": "w4"}, x, reconstruction="none", correction=None, memory=memory, progress=False)
        for memory in (None, "4 MB", "1 KB")
    )
    assert whole.notes["working_bytes"] > 4e6 >= limited.notes["working_bytes"]
    assert "blocks" not in whole.notes["rounding"]["0"] and "blocks of inputs" in limited.notes["rounding"]["0"]
    assert any("memory='1 KB' cannot be kept" in notice for notice in least.notes["notices"])


def test_a_profile_keeps_to_the_memory_given() -> None:
    model, x = nn.Sequential(nn.Linear(600, 4)).eval(), torch.randn(32, 600)
    found = quantkit.profile(model, x, schemes=["w4", "w8"], memory="4 MB", progress=False)
    assert "blocks of inputs" in found.provenance["rounded"]["0"]
    with pytest.raises(InvalidRequest, match="memory='much'"):
        quantkit.profile(model, x, memory="much")


@pytest.mark.parametrize("how", ["none", "network", "block", "adaquant"])
def test_it_is_announced_before_and_noted_after(how: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="quantkit"):
        result = apply(small(), dict.fromkeys(SMALL, "w3a8"), images(96), reconstruction=how, correction=None)
    said = [record.getMessage() for record in caplog.records if "memory at most about" in record.getMessage()]
    assert len(said) == 1 and f"{result.notes['working_bytes'] / 1e6:,.0f} MB" in said[0]


def leaving(count: int) -> Tensor:
    """What the small network makes of so many images, played from its program."""
    ready, recording = recorded(images(count))
    floats = float_program(ready.model, recording.program, copied_state(recording.program, ready.model))
    return play_output(floats, recording.program.entering(ready.model, recording.samples[0]), whole(recording.program))


def test_values_on_disk_are_those_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held, asked = leaving(150), []
    monkeypatch.setattr(
        playback, "room_for", lambda count, like, *_: asked.append(count) or room_for(count, like, limit=0)
    )
    spilled = leaving(150)
    assert asked == [150]
    assert torch.equal(spilled, held)
    assert not list(tmp_path.iterdir())


def test_room_is_in_a_file_only_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    like = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    size = 7 * 60 * 4
    inside, beyond = room_for(7, like, limit=size), room_for(7, like, limit=size - 1)
    assert inside.is_contiguous(memory_format=torch.channels_last) and inside.shape == beyond.shape == (7, 3, 4, 5)
    beyond[:] = torch.arange(7 * 60.0).reshape(7, 3, 4, 5)
    assert "deleted" in Path("/proc/self/maps").read_text().split("quantkit-", 1)[1].splitlines()[0]
    assert float(beyond.sum()) == sum(range(7 * 60))
    del beyond
    gc.collect()
    assert not any(
        "quantkit-" in line and str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines()
    )
