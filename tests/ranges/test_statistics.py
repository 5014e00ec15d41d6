"""Hessians and histograms are those of the tensors the layers and sites really get, however the data is batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.errors import InvalidRequest
from quantkit.numbers.uniform import SiteRange
from quantkit.program.inputs import Batch, split_batches
from quantkit.program.intercept import OpKey
from quantkit.program.layers import Weights
from quantkit.program.record import record
from quantkit.program.sites import Site
from quantkit.ranges import statistics
from quantkit.ranges.activations import Extremes, Histogram
from quantkit.ranges.statistics import (
    hessian_bytes,
    in_memory_bound,
    layer_hessians,
    rows_seen,
    site_histograms,
)
from quantkit.simulation.model import SimulatedModel

LAYERS = ("stem", "grouped", "twice", "head")


class Mixed(nn.Module):
    """A strided convolution, a grouped one, one called twice, a linear layer; ``tail`` counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, (3, 2), groups=2, dilation=(1, 2))
        self.twice = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)
        self.tail = nn.Linear(5, 2)
        self.tail_runs = 0
        self.tail.register_forward_pre_hook(self.count)

    def count(self, _module: nn.Module, _args: object) -> None:
        self.tail_runs += 1

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        x = self.twice(torch.tanh(self.twice(x)))
        return self.tail(F.relu(self.head(x.mean((2, 3)))))


@pytest.fixture
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def image_batch(count: int = 12) -> Batch:
    return (torch.randn(count, 2, 9, 11, generator=torch.Generator().manual_seed(1)),), {}


def hessians(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Batch], **site_ranges: SiteRange
) -> dict[str, Tensor]:
    sites = [Site("input", OpKey("", "input"))]
    simulated = SimulatedModel(model, sites, {}, site_ranges)
    found = layer_hessians(simulated, record(model, batches[0]), layers, batches)
    return {name: moments.hessian for name, moments in found.items()}


def captured_inputs(model: nn.Module, layers: Sequence[str], batch: Batch) -> dict[str, list[Tensor]]:
    """What each layer was called with, by module hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
        for name in layers
    ]
    with torch.no_grad():
        model(*batch[0])
    for hook in hooks:
        hook.remove()
    return seen


def gram_of(layer: nn.Module, x: Tensor) -> Tensor:
    """X^T X of one call, float64, by ``unfold`` and a loop over output positions."""
    if isinstance(layer, nn.Linear):
        return (x.double().T @ x.double())[None]
    options = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    patches = F.unfold(x.double(), layer.kernel_size, **options)  # (batch, C x kernel, positions)
    width = patches.shape[1] // layer.groups
    total = torch.zeros(layer.groups, width, width, dtype=torch.float64)
    for g in range(layer.groups):
        part = patches[:, g * width : (g + 1) * width]
        for position in range(part.shape[2]):
            total[g] += part[:, :, position].T @ part[:, :, position]
    return total


def test_hessians_are_the_products_of_captured_inputs(model: Mixed) -> None:
    batch = image_batch()
    found = hessians(model, LAYERS, [batch])
    seen = captured_inputs(model, LAYERS, batch)
    assert [len(seen[name]) for name in LAYERS] == [1, 1, 2, 1]
    assert set(found) == set(LAYERS)
    for name in LAYERS:
        layer = model.get_submodule(name)
        wanted = sum(gram_of(layer, x) for x in seen[name])
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [1, 5])
def test_hessians_do_not_depend_on_batches(model: Mixed, size: int) -> None:
    whole = image_batch()
    once = hessians(model, LAYERS, [whole])
    split = hessians(model, LAYERS, split_batches([whole], size))
    for name in LAYERS:
        torch.testing.assert_close(split[name], once[name], rtol=1e-5, atol=1e-5 * float(once[name].abs().max()))


def test_hessians_do_not_depend_on_slices_of_rows(model: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    once = hessians(model, LAYERS, [image_batch()])
    monkeypatch.setattr(statistics, "ROWS", 7)
    for name, sliced in hessians(model, LAYERS, [image_batch()]).items():
        torch.testing.assert_close(sliced, once[name], rtol=1e-5, atol=1e-5 * float(once[name].abs().max()))


def test_hessians_are_summed_in_double_precision() -> None:
    """2^26 + 1 is not a float32."""
    large, one = ((torch.full((1, 1), 2.0**13),), {}), ((torch.ones(1, 1),), {})
    found = hessians(nn.Sequential(nn.Linear(1, 1)), ["0"], [large, *[one] * 5])
    assert found["0"].item() == 2**26 + 5


def test_hessians_see_quantized_sites_and_leave_the_data_alone(model: Mixed) -> None:
    batch = image_batch()
    before = batch[0][0].clone()
    coarse = SiteRange(0.5, 8, 4)
    found = hessians(model, ["stem"], [batch], input=coarse)["stem"]
    wanted = gram_of(model.stem, coarse.fake_quantize(before))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)
    assert not torch.allclose(found, gram_of(model.stem, before), rtol=1e-3)
    assert torch.equal(batch[0][0], before)


def test_forward_stops_at_the_last_layer_asked_for(model: Mixed) -> None:
    batches = split_batches([image_batch()], 4)
    structure = record(model, batches[0])
    simulated = SimulatedModel(model, (), {}, {})
    for layers, runs in ((["twice", "stem"], 0), (["tail", "stem"], 3)):
        model.tail_runs = 0
        found = layer_hessians(simulated, structure, layers, batches)
        assert set(found) == set(layers)
        assert model.tail_runs == runs
    with torch.no_grad():  # nothing is left behind
        assert torch.equal(model(*batches[0][0]), simulated(*batches[0][0]))


def test_layer_called_twice_is_seen_twice_when_it_is_the_last(model: Mixed) -> None:
    batch = image_batch()
    seen = captured_inputs(model, ["twice"], batch)["twice"]
    found = hessians(model, ["twice"], [batch])["twice"]
    torch.testing.assert_close(found, sum(gram_of(model.twice, x) for x in seen), rtol=1e-5, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(widths=st.lists(st.integers(1, 12), min_size=1, max_size=12), bound=st.integers(8, 3000))
def test_runs_keep_order_and_stay_under_the_bound(widths: list[int], bound: int) -> None:
    model = nn.Sequential(*(nn.Linear(width, 2) for width in widths))
    names = [str(i) for i in range(len(widths))]
    weights = Weights.of_modules(model)
    runs = list(in_memory_bound(weights, names, bound))
    sizes = {name: hessian_bytes(weights.layers[name], bound) for name in names}
    held = [sum(sizes[name] for name in run) for run in runs]
    assert [name for run in runs for name in run] == names
    assert all(run for run in runs)
    assert all(total <= bound or len(run) == 1 for run, total in zip(runs, held, strict=True))
    for total, following in zip(held, runs[1:], strict=False):
        assert total + sizes[following[0]] > bound  # no run ends early


def test_bound_counts_what_layer_hessians_makes(model: Mixed) -> None:
    exact = sum(h.numel() * h.element_size() for h in hessians(model, LAYERS, [image_batch()]).values())
    weights = Weights.of_modules(model)
    assert list(in_memory_bound(weights, LAYERS, exact)) == [list(LAYERS)]
    assert list(in_memory_bound(weights, LAYERS, exact - 1)) == [list(LAYERS[:-1]), [LAYERS[-1]]]
    assert list(in_memory_bound(weights, [])) == []


SITES = [Site("input", OpKey("", "input")), Site("stem", OpKey("stem", "conv2d")), Site("tanh", OpKey("", "tanh"))]


def test_histograms_are_those_of_the_sites_tensors(model: Mixed) -> None:
    batches = split_batches([image_batch()], 5)
    found = site_histograms(model, SITES, batches, progress=False)
    with torch.no_grad():
        x = image_batch()[0][0]
        stem = model.stem(x)
        tanh = torch.tanh(model.twice(F.relu(model.grouped(F.relu(stem)))))
    assert list(found) == ["input", "stem", "tanh"]
    for name, tensor in (("input", x), ("stem", stem), ("tanh", tanh)):
        wanted = Histogram.empty(Extremes().seen(tensor)).seen(tensor)
        assert found[name].extremes.low == pytest.approx(wanted.extremes.low, rel=1e-5)
        assert found[name].extremes.high == pytest.approx(wanted.extremes.high, rel=1e-5)
        moved = (found[name].counts - wanted.counts).cumsum(0).abs().max()
        assert found[name].counts.sum() == tensor.numel() and moved <= 3  # a value on the edge of two bins


def spoil(value: float) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda _module, _args, output: output.index_fill(0, torch.tensor([0]), value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_site_that_is_not_finite_is_refused_by_name(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    model[0].register_forward_hook(spoil(value))
    site = Site("1", OpKey("1", "relu")) if value > 0 else Site("0", OpKey("0", "index_fill"))
    with pytest.raises(InvalidRequest, match=rf"NaN or infinite values at {site.name} on the calibration inputs"):
        site_histograms(model, [site], [((torch.ones(2, 3),), {})], progress=False)


def test_inputs_reach_every_matrix_of_a_recurrent_call() -> None:
    model, batch = nn.LSTM(3, 4, 2, batch_first=True).eval(), ((torch.randn(2, 5, 3),), {})
    program = record(model, batch)
    found = rows_seen(SimulatedModel(model, (), {}, {}), program, list(program.calls), [batch, batch])
    assert found == dict.fromkeys(["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"], 2 * 2 * 5)
