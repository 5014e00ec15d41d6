"""A program computes what the model computes, from the start and from every place a forward can be cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantkit.program.inputs import Batch
from quantkit.program.outputs import main_output
from quantkit.program.program import Part, Program
from quantkit.program.segments import cuts_of
from tests.program.models import randn
from tests.program.replays import program_of
from tests.stages.networks import ConvReused, FunctionalReLU, ImageAndFeatures, MobileNet, small


def image_batch(seed: int, channels: int = 3) -> Batch:
    return (randn(4, channels, 8, 8, seed=seed),), {}


def image_and_features(seed: int) -> Batch:
    return (), {"features": randn(4, 5, seed=seed), "image": randn(4, 3, 8, 8, seed=seed)}


MODELS = {
    "residual": (small, lambda seed: image_batch(seed, 2)),
    "depthwise": (lambda: MobileNet().eval(), image_batch),
    "in place": (lambda: FunctionalReLU().eval(), image_batch),
    "keywords": (lambda: ImageAndFeatures().eval(), image_and_features),
    "reused": (lambda: ConvReused().eval(), image_batch),
}


@pytest.fixture(params=MODELS, ids=str)
def case(request) -> tuple[nn.Module, Program, Batch]:
    build, batch = MODELS[request.param]
    torch.manual_seed(0)
    model = build()
    program = program_of(model, batch(1), batch(2))
    assert program is not None
    return model, program, batch(3)


def output_of(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return main_output(model(*(t.clone() for t in batch[0]), **{k: t.clone() for k, t in batch[1].items()}))


def test_a_replay_computes_what_the_model_computes_on_other_inputs(case: tuple[nn.Module, Program, Batch]) -> None:
    model, program, batch = case
    with torch.no_grad():
        (found,) = program.replay(program.entering(model, batch), program.state_of(model), [program.output])
    torch.testing.assert_close(found, output_of(model, batch))


def test_a_forward_can_be_cut_at_every_cut(case: tuple[nn.Module, Program, Batch]) -> None:
    model, program, batch = case
    state, cuts = program.state_of(model), cuts_of(program)
    assert cuts
    for after, cut in cuts.items():
        first = Part(0, after + 1)
        second = Part(after + 1, len(program.steps), first.shapes)  # filled by the first
        with torch.no_grad():
            values = program.replay(program.entering(model, batch), state, cut.live, part=first)
            (found,) = program.replay(dict(zip(cut.live, values, strict=True)), state, [program.output], part=second)
        torch.testing.assert_close(found, output_of(model, batch))


def test_other_parameters_may_take_the_place_of_the_models() -> None:
    model = small()
    program = program_of(model, image_batch(1, 2), image_batch(2, 2))
    assert program is not None
    batch = image_batch(3, 2)
    state = program.state_of(model) | {"head.bias": torch.full((10,), 7.0)}
    with torch.no_grad():
        (found,) = program.replay(program.entering(model, batch), state, [program.output])
    torch.testing.assert_close(found, output_of(model, batch) - model.head.bias + 7)


class Viewing(nn.Module):
    """Flattens by ``view``, which refuses channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4 * 6 * 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def test_the_layout_is_the_one_a_model_can_run_in() -> None:
    model = Viewing().eval()
    program = program_of(model, image_batch(1), image_batch(2))
    assert program is not None and not program.channels_last
    batch = image_batch(3)
    with torch.no_grad():
        (found,) = program.replay(program.entering(model, batch), program.state_of(model), [program.output])
    torch.testing.assert_close(found, output_of(model, batch))


class Counted(nn.Module):
    """A sequence of vectors, whose length is asked in a way that leaves no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.arange(int(x.shape[1]), dtype=torch.float32).unsqueeze(-1)


class CountedSignal(nn.Module):
    """The same of a signal, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.linspace(0, 1, len(x[0, 0]))


@pytest.mark.parametrize(
    ("model", "shape"), [(Counted(), (6, 8)), (CountedSignal(), (8, 6))], ids=["vectors", "signal"]
)
@pytest.mark.parametrize("length", [3, 11])
def test_lengths_of_sequences_are_followed_where_the_code_hides_them(
    model: nn.Module, shape: tuple[int, int], length: int
) -> None:
    program = program_of(model.eval(), ((randn(4, *shape),), {}))
    assert program is not None
    batch = ((randn(3, *(length if size == 6 else size for size in shape), seed=1),), {})
    with torch.no_grad():
        (found,) = program.replay(program.entering(model, batch), program.state_of(model), [program.output])
    torch.testing.assert_close(found, output_of(model, batch))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.mean() > 0 else x * 2


class Unseen(nn.Module):
    """Computes where no torch call is seen."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2) + 1


@pytest.mark.parametrize("model", [Branching(), Unseen()], ids=["branching", "unseen"])
def test_no_tape_where_a_replay_would_compute_something_else(model: nn.Module) -> None:
    high, low = ((torch.ones(4, 3),), {}), ((-torch.ones(4, 3),), {})
    assert program_of(model, high, low) is None
