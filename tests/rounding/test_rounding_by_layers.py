"""Rounding in one replay gives the codes of rounding in sequence: the same layers on the same inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.formats import Scheme
from quantkit.numbers.uniform import SiteRange
from quantkit.program.inputs import Batch
from quantkit.program.program import Program
from quantkit.program.segments import Segment, between_layers
from quantkit.ranges.statistics import layer_hessians
from quantkit.rounding import Moments, by_layers
from quantkit.rounding.by_layers import moments, round_by_layers
from quantkit.rounding.in_sequence import round_in_sequence
from quantkit.rounding.layer_inputs import LEAST_POSITIONS, positions_wanted
from quantkit.rounding.request import RoundingRequest
from quantkit.rounding.weights import quantize_weight
from quantkit.simulation.model import SimulatedModel
from quantkit.simulation.playback import SimulatedProgram, Values, in_chunks, move
from quantkit.stages.recording import program_of_sizes, replay_of
from quantkit.targets import Target
from quantkit.transforms.prepare import Prepared, prepare
from tests.program.models import Net, randn
from tests.program.replays import program_of
from tests.program.test_segments import Chain
from tests.rounding.columns import input_columns
from tests.stages.networks import ConvReused, MobileNet

W3, TARGET = Scheme.parse("w3").weight, Target.load("onnxruntime-cpu")


def recorded(model: nn.Module, x: Tensor) -> tuple[Prepared, Program, list[Segment]]:
    ready = prepare(model, [((x,), {})], TARGET)
    program = program_of(ready.model, ((x[:8],), {}), ((x[8:16],), {}))
    assert program is not None
    return ready, program, between_layers(program, ready.quantizable)


def parts_of(ready: Prepared, program: Program, x: Tensor) -> list[Values]:
    """What enters the program, in parts."""
    return [part for part, _ in in_chunks(program, program.entering(ready.model, ((x,), {})))]


@pytest.mark.parametrize("build", [Chain, MobileNet, ConvReused], ids=lambda build: build.__name__)
def test_hessians_are_those_of_whole_forwards(build: type[nn.Module]) -> None:
    x = randn(21, 3, 8, 8, seed=1)
    ready, program, segments = recorded(build().eval(), x)
    ranges = {site.name: SiteRange(0.0037, 60) for site in ready.sites}
    simulated = SimulatedModel(ready.model, ready.sites, {}, ranges)
    wanted = layer_hessians(simulated, ready.program, ready.quantizable, [((x[:12],), {}), ((x[12:],), {})])
    parts = parts_of(ready, program, x)
    for segment in segments:
        for name in segment.layers:
            found = moments(SimulatedProgram(simulated, program), segment, name, parts).hessian
            exact = wanted[name].hessian
            assert float((found - exact).norm() / exact.norm()) < 5e-3, name  # sums on a tie tip a code
        move(SimulatedProgram(simulated, program), parts, segment)


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_codes_are_those_of_rounding_in_sequence(rounding: str) -> None:
    x, formats = randn(75, 3, 8, 8, seed=1), {}
    found = []
    for in_one_replay in (False, True):
        torch.manual_seed(0)
        ready, program, _ = recorded(Chain().eval(), x)
        simulated = SimulatedModel(ready.model, ready.sites, {}, {s.name: SiteRange(0.05, 60) for s in ready.sites})
        formats = {name: Scheme.parse("w3").weight for name in ready.quantizable[1:-1]}
        request = RoundingRequest(formats, rounding, progress=False)
        if in_one_replay:
            inputs = program.entering(ready.model, ((x,), {}))
            how = round_by_layers(SimulatedProgram(simulated, program), [inputs], request)
        else:
            how = round_in_sequence(simulated, ready.program, [((x,), {})], request)
        found.append((simulated.weights, how))
    (one, said), (other, said_too) = found
    assert said == said_too and set(said) == set(formats)
    for name in one:
        same = (one[name].codes == other[name].codes).float().mean()
        assert same > 0.97, name  # a sum in another order may tip a code on a tie, and that those after it
        torch.testing.assert_close(one[name].scale, other[name].scale)


def heads_behind_a_layer(self, x):
    """The length is that of an input that nobody reads any more."""
    y = self.two(self.one(x)).reshape(x.shape[0], x.shape[1], 2, 3).mT
    return self.three(y.reshape(x.shape[0], x.shape[1], 6))


def queries_and_memory(self, x, memory):
    """Two lengths, one of which is read far behind where it is known."""
    steps, keys = x.shape[1], self.two(memory)
    weights = (self.one(x) @ keys.mT).softmax(-1)
    return self.three((weights @ keys).reshape(-1, 6)).reshape(len(x), steps, -1)


def layers(width: int) -> dict[str, nn.Module]:
    return {"one": nn.Linear(4, width), "two": nn.Linear(width if width == 4 else 4, 6), "three": nn.Linear(6, 3)}


SEVERAL_SIZES: dict[str, tuple[Callable[[], nn.Module], list[Batch]]] = {
    "images": (
        lambda: Net(lambda self, x: self.two(F.relu(self.one(x))), one=nn.Conv2d(3, 6, 3), two=nn.Conv2d(6, 4, 1)),
        [((randn(5, 3, side, 8, seed=side),), {}) for side in (6, 7, 9)],
    ),
    "a length behind a layer": (
        lambda: Net(heads_behind_a_layer, **layers(4)),
        [((randn(5, steps, 4, seed=steps),), {}) for steps in (6, 7, 9)],
    ),
    "two lengths": (
        lambda: Net(queries_and_memory, **layers(6)),
        [((randn(5, a, 4, seed=a), randn(5, b, 4, seed=b)), {}) for a, b in ((4, 7), (4, 10), (6, 7), (7, 7))],
    ),
}


@pytest.mark.parametrize("case", SEVERAL_SIZES)
def test_batches_of_several_sizes_are_replayed_together(case: str) -> None:
    build, batches = SEVERAL_SIZES[case]
    torch.manual_seed(0)
    model = build().eval()
    ready = prepare(model, batches, TARGET)
    program = program_of_sizes(ready, batches)
    assert program is not None
    request, found = RoundingRequest(dict.fromkeys(ready.quantizable, W3), progress=False), []
    for in_one_replay in (False, True):
        fresh = prepare(model, batches, TARGET)
        simulated = SimulatedModel(fresh.model, (), {}, {})
        if in_one_replay:
            inputs = [program.entering(fresh.model, batch) for batch in batches]
            round_by_layers(SimulatedProgram(simulated, program), inputs, request)
        else:
            round_in_sequence(simulated, fresh.program, batches, request)
        found.append(simulated.weights)
    for name in ready.quantizable:
        assert (found[0][name].codes == found[1][name].codes).float().mean() > 0.97, name


def same_lengths(self, x, y):
    z = self.a(x).mean(1) + self.a(y).mean(1)
    return z.tanh() if x.shape[1] == y.shape[1] else z


def packed(self, x, lengths):
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return self.b(self.a(rows)[1][0][-1])


def graph(self, nodes, edges):
    return self.a(torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]]))


def edges(nodes: int) -> Tensor:
    return torch.stack([torch.arange(nodes), torch.arange(nodes).flip(0)])


NOT_REPLAYED: dict[str, tuple[nn.Module, list[Batch]]] = {
    "looks at its size": (
        Net(lambda self, x: self.a(x) if x.shape[1] < 8 else self.a(x).tanh(), a=nn.Linear(4, 4)),
        [((randn(5, steps, 4),), {}) for steps in (6, 9)],
    ),
    "does else where two sizes meet": (
        Net(same_lengths, a=nn.Linear(4, 4)),
        [((randn(5, a, 4), randn(5, b, 4)), {}) for a, b in ((4, 5), (5, 4), (6, 7), (7, 6), (8, 9), (6, 6))],
    ),
    "sizes follow values": (
        Net(packed, a=nn.LSTM(4, 4, batch_first=True), b=nn.Linear(4, 2)),
        [((randn(4, steps, 4), torch.tensor([steps, 2, 3, 1])), {}) for steps in (6, 9)],
    ),
    "no samples along the first axis": (
        Net(graph, a=nn.Linear(4, 4)),
        [((randn(nodes, 4), edges(nodes)), {}) for nodes in (12, 14)],
    ),
    "takes a number beside tensors": (
        Net(lambda self, x, times: self.a(x[:, :times]), a=nn.Linear(4, 4)),
        [((randn(5, steps, 4), steps - 3), {}) for steps in (6, 9)],
    ),
}


@pytest.mark.parametrize("case", NOT_REPLAYED)
def test_no_program_stands_for_a_model_that_cannot_be_replayed(case: str) -> None:
    model, batches = NOT_REPLAYED[case]
    ready = prepare(model.eval(), batches, TARGET)
    assert isinstance(replay_of(ready, batches), str)
    assert program_of_sizes(ready, batches) is None


class Counted(TorchDispatchMode):
    """How often operations are carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_no_layer_is_run_twice() -> None:
    """The last layer is not run at all, and the others once for each of two parts of the samples."""
    x = randn(75, 3, 8, 8, seed=1)
    ready, program, _ = recorded(Chain().eval(), x)
    request = RoundingRequest(dict.fromkeys(ready.quantizable, W3), progress=False)
    runner = SimulatedProgram(SimulatedModel(ready.model, ready.sites, {}, {}), program)
    with Counted() as counted:
        round_by_layers(runner, [program.entering(ready.model, ((x,), {}))], request)
    convolutions = [name for name in ready.quantizable if name != "head"]
    assert counted.counts["convolution"] == 2 * len(convolutions) == 14


class Attention(nn.Module):
    """Three layers that read one value, and a fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT
        return self.out(scores.softmax(-1) @ self.value(x))


def test_layers_that_read_one_value_share_its_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(6, 5, 8, seed=1)
    ready, program, segments = recorded(Attention().eval(), x)
    assert [segment.layers for segment in segments] == [(), ("query", "key", "value"), ("out",)]
    collected = []
    monkeypatch.setattr(by_layers, "moments", lambda *given: collected.append(given[2]) or moments(*given))
    request = RoundingRequest(dict.fromkeys(ready.quantizable, W3), progress=False)
    floats = {name: ready.weights[name].clone() for name in ready.quantizable}
    simulated = SimulatedModel(ready.model, (), {}, {})
    round_by_layers(SimulatedProgram(simulated, program), [program.entering(ready.model, ((x,), {}))], request)
    assert collected == ["query", "out"]
    rows = x.reshape(-1, 8).double()
    for name in ("query", "key", "value"):
        alone = quantize_weight(floats[name], [W3], Moments((rows.T @ rows)[None])).weights[W3]
        assert torch.equal(simulated.weights[name].codes, alone.codes)


def test_of_many_positions_some_are_drawn_and_their_inputs_are_right() -> None:
    x, weight = randn(3, 4, 20, 20), randn(6, 4, 3, 3)
    every = input_columns("conv2d", (x, weight), {"padding": 1}).reshape(400, 3, 36)
    some = input_columns("conv2d", (x, weight), {"padding": 1}, torch.Generator().manual_seed(0))
    assert positions_wanted(36) == LEAST_POSITIONS == 128
    some = some.reshape(128, 3, 36)
    for sample in range(3):
        rows = {tuple(row.tolist()) for row in every[:, sample]}
        assert all(tuple(row.tolist()) in rows for row in some[:, sample])
        assert len({tuple(row.tolist()) for row in some[:, sample]}) == 128


def test_all_positions_count_where_they_are_few() -> None:
    x, weight = randn(3, 4, 8, 8), randn(6, 4, 3, 3)
    every = input_columns("conv2d", (x, weight), {})
    assert torch.equal(every, input_columns("conv2d", (x, weight), {}, generator=torch.Generator().manual_seed(0)))
