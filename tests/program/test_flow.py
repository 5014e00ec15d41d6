"""Which sites a plan has, by bookkeeping over names, against placing them in the traced graph."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from torch import nn

from quantkit.plan.operations import Execution, Operation, execute, live_sites, peak_bytes
from quantkit.program.inputs import Batch
from quantkit.program.operations import operations_of
from quantkit.program.sites import place_sites
from quantkit.targets import Target
from quantkit.transforms.prepare import prepare
from tests.backends.models import Residual
from tests.program.models import IMAGE, MobileNetBlock, Shortcuts, randn, settled
from tests.stages.networks import ConvReused, FunctionalReLU, ImageAndFeatures, MobileNet, Small

TARGET = Target.load("onnxruntime-cpu")
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "small": lambda: (settled(Small()), ((randn(2, 2, 6, 6),), {})),
    "residual": lambda: (Residual(), ((randn(2, 3, 8, 8),), {})),
    "shortcuts": lambda: (Shortcuts(), IMAGE),
    "depthwise": lambda: (settled(MobileNet()), ((randn(2, 3, 8, 8),), {})),
    "inverted residual": lambda: (MobileNetBlock(), ((randn(2, 4, 8, 8),), {})),
    "in place": lambda: (FunctionalReLU(), ((randn(2, 3, 8, 8),), {})),
    "two inputs": lambda: (ImageAndFeatures(), ((), {"image": randn(2, 3, 8, 8), "features": randn(2, 5)})),
    "twice": lambda: (ConvReused(), ((randn(2, 3, 8, 8),), {})),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_of_any_mixture_are_those_the_graph_places(name: str) -> None:
    model, batch = NETWORKS[name]()
    ready = prepare(model, [batch], TARGET)
    operations = operations_of(ready.program, ready.sites, TARGET)
    draw, layers = random.Random(0), ready.quantizable
    mixtures = [[n for n in layers if draw.random() < share] for share in (0.2, 0.5, 0.5, 0.5, 0.8)]
    for chosen in [[], layers, *mixtures]:
        placed = place_sites(ready.model, ready.program, TARGET, chosen, ready.float_sums)
        assert execute(operations, chosen).coded == {site.name for site in placed}, chosen


def test_operations_of_a_residual_network() -> None:
    ready = prepare(NETWORKS["small"]()[0], [NETWORKS["small"]()[1]], TARGET)
    found = [(op.name, op.kind, op.reads, op.writes) for op in operations_of(ready.program, ready.sites, TARGET)]
    assert found == [
        ("stem.0", "layer", ("input",), ("stem.2",)),
        ("conv", "layer", ("stem.2",), ("/relu",)),
        ("mix", "layer", ("/relu",), ("mix",)),
        ("/add", "integer", ("mix", "stem.2"), ("/relu.1",)),
        ("/mean", "float", ("/relu.1",), ("/mean",)),
        ("head", "layer", ("/mean",), ()),
    ]


CHAIN = (
    Operation("a", "layer", ("x",), ("y",), codes_output=True),
    Operation("b", "layer", ("y",), ("z",), codes_output=True),
    Operation("plus", "integer", ("z", "y"), ("s",)),
    Operation("mean", "float", ("s",), ("m",)),
    Operation("c", "layer", ("m",)),
)


@pytest.mark.parametrize(
    ("layers", "integer", "coded", "quantized", "dequantized"),
    [
        ("", "", "", "", ""),
        ("a", "a plus", "xyzs", "xz", "ys"),  # b reads y in float, and what it makes is read as codes
        ("b", "b plus", "yzs", "y", "s"),
        ("ab", "a b plus", "xyzs", "x", "s"),
        ("c", "c", "m", "m", ""),
        ("abc", "a b plus c", "xyzsm", "xm", "s"),
    ],
)
def test_conversions_stand_where_float_and_codes_meet(
    layers: str, integer: str, coded: str, quantized: str, dequantized: str
) -> None:
    found = execute(CHAIN, set(layers))
    assert found == Execution(
        frozenset(integer.split()), frozenset(coded), frozenset(quantized), frozenset(dequantized)
    )


def test_a_site_lives_from_its_maker_to_its_last_reader() -> None:
    assert live_sites(CHAIN, "xyzsm") == [("x", "y"), ("y", "z"), ("y", "z", "s"), ("s", "m"), ("m",)]
    sizes = {"x": 100, "y": 10, "z": 4, "s": 2, "m": 1}
    assert peak_bytes(CHAIN, sizes) == 110
    assert peak_bytes(CHAIN, sizes | {"x": 1}) == 16
    assert peak_bytes((), sizes) == 0
