"""Parameters by name, from a module or from the files of a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quantkit.errors import CorruptFile, InvalidRequest
from quantkit.program.record import record
from quantkit.program.weight_source import INDEX, SINGLE, ModuleSource, ShardedSource


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3).bfloat16()).eval()


@pytest.fixture
def sharded(model, tmp_path) -> ShardedSource:
    state = model.state_dict()
    placed = {name: f"model-{1 + (name[0] == '2')}-of-2.safetensors" for name in state}
    for shard in set(placed.values()):
        save_file({name: state[name] for name in state if placed[name] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": placed}))
    return ShardedSource(tmp_path)


def test_a_module_gives_its_own_tensors(model):
    found = ModuleSource(model).tensors(["0.weight", "1.running_mean"])
    assert list(found) == ["0.weight", "1.running_mean"]
    assert found["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert not found["0.weight"].requires_grad


def test_shards_give_what_the_module_gives(model, sharded):
    names = ["2.weight", "0.bias", "1.running_var"]
    wanted = ModuleSource(model).tensors(names)
    found = sharded.tensors(names)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) and found[n].dtype == wanted[n].dtype for n in names)


def test_a_single_file_needs_no_index(model, tmp_path):
    save_file(model.state_dict(), tmp_path / SINGLE)
    found = ShardedSource(tmp_path).tensors(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_segment_replays_on_what_it_reads_of_the_shards(model, sharded):
    model = model.float()
    program = record(model, ((torch.randn(3, 4),), {}))
    names = program.names_read(0, 1)
    assert names == {"0.weight", "0.bias"}
    x = torch.randn(3, 4)
    state = sharded.tensors(program.names_read(0, len(program.steps)))
    (found,) = program.replay(
        dict(zip(program.inputs, [x], strict=True)),
        {n: t.to(torch.float32) for n, t in state.items()},
        program.outputs,
    )
    torch.testing.assert_close(found, model(x))


def test_shards_are_read_only_where_they_are_needed(sharded):
    (sharded.folder / "model-2-of-2.safetensors").unlink()
    assert list(sharded.tensors(["0.weight"])) == ["0.weight"]
    with pytest.raises(CorruptFile, match=r"model-2-of-2.safetensors.*missing or damaged"):
        sharded.tensors(["2.weight"])


def test_unknown_names_and_folders_are_refused(sharded, tmp_path):
    with pytest.raises(InvalidRequest, match=r"no tensor '0.wieght'.*0.weight"):
        sharded.tensors(["0.wieght"])
    (tmp_path / "empty").mkdir()
    with pytest.raises((InvalidRequest, CorruptFile), match="empty"):
        ShardedSource(tmp_path / "empty").tensors(["0.weight"])
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CorruptFile, match="list of tensors"):
        ShardedSource(tmp_path).tensors(["0.weight"])
