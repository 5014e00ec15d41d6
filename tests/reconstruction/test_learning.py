"""Learning keeps the best it has seen on held-back data, and gives every sample its turn."""

from __future__ import annotations

import pytest
import torch

from quantkit.reconstruction.learning import Schedule, Training, learn, shuffled


def test_every_sample_once_before_any_comes_again() -> None:
    draws = shuffled(10, 4, 5, torch.Generator().manual_seed(0))
    assert [len(d) for d in draws] == [4] * 5
    assert sorted(torch.cat(draws[:2]).tolist() + draws[2][:2].tolist()) == list(range(10))


def run(held_back, rate: float = 0.05, steps: int = 80, **options):
    x = torch.tensor([3.0], requires_grad=True)
    learned = learn(
        [(x, rate)],
        lambda indices: [(x - 1).square().sum()],
        lambda: held_back(float(x.detach())),
        4,
        Training(Schedule(steps, batch=2, **options), torch.Generator().manual_seed(0), progress=False),
    )
    return float(x.detach()), learned


def test_the_loss_falls_and_what_was_learned_stays() -> None:
    x, learned = run(lambda x: (x - 1) ** 2)
    assert learned.before == 4.0 and learned.after == (x - 1) ** 2 < 2.0
    assert learned.helped


def test_what_does_not_help_on_held_back_data_is_undone() -> None:
    x, learned = run(lambda x: (x - 5) ** 2)
    assert x == 3.0 and learned.after == learned.before == 4.0
    assert not learned.helped


def test_the_best_of_the_checks_is_kept() -> None:
    """Held-back data that like 2.5 best, on the way to 1: overfitting."""
    seen = []

    def held_back(x: float) -> float:
        seen.append(x)
        return abs(x - 2.5)

    x, learned = run(held_back)
    assert len(seen) == 5
    assert learned.after == min(abs(v - 2.5) for v in seen) and x in seen and x not in (seen[0], seen[-1])


def test_what_is_checked_and_kept_is_the_running_mean_of_the_steps() -> None:
    """Against the recursion over the steps of a run without a mean; the steps themselves do not change."""
    steps: list[float] = []
    means: list[float] = []
    run(lambda x: steps.append(x) or 0.0, steps=20, checks=20)
    x, learned = run(lambda x: means.append(x) or abs(x - 1), steps=20, checks=20, averaging=0.8)
    wanted = steps[:1]
    for step in steps[1:]:
        wanted.append(0.8 * wanted[-1] + 0.2 * step)
    assert means == pytest.approx(wanted)
    assert x == pytest.approx(wanted[-1]) and learned.after == pytest.approx(abs(wanted[-1] - 1))
