"""Problems as hypothesis draws them: small numbers, ties, zeros, far-apart magnitudes, groups that may have nothing in
common."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from quantkit.allocation.problem import Choice, Option, Problem
from tests.allocation.helpers import TAGS, random_problem


def repeatable(examples: int) -> Any:
    """The same examples every time: a red run in CI is red on the next machine too."""
    return settings(deadline=None, derandomize=True, max_examples=examples, database=None)


MAGNITUDES = (1e-8, 1e-3, 1.0, 1e6)


@st.composite
def awkward_problems(draw: st.DrawFn, limits: tuple[int, int] = (1, 3), choices: int = 5, options: int = 4) -> Problem:
    """Free of any order between width, cost and damage."""
    count, kinds = draw(st.integers(1, choices)), draw(st.integers(*limits))
    unit, tags = draw(st.sampled_from([1, 6, 10**7])), draw(st.sampled_from([("",), TAGS]))
    costs = st.lists(st.integers(0, 12).map(lambda c: c * unit), min_size=kinds, max_size=kinds).map(tuple)
    damages = st.builds(lambda a, b: a * b, st.integers(-2, 20), st.sampled_from(MAGNITUDES))
    made = []
    for i in range(count):
        keys = draw(
            st.lists(
                st.tuples(st.sampled_from(["w2", "w4", "w8"]), st.sampled_from(tags)),
                min_size=1,
                max_size=options,
                unique=True,
            )
        )
        made.append(Choice(f"c{i}", tuple(Option(name, draw(damages), draw(costs), tag) for name, tag in keys)))
    names = st.lists(st.sampled_from([c.name for c in made]), min_size=1, max_size=3, unique=True).map(tuple)
    groups = st.lists(names, max_size=2).map(tuple)
    reach = [[sum(f(o.costs[k] for o in c.options) for c in made) for f in (min, max)] for k in range(kinds)]
    amounts = [draw(st.integers(least - least // 8 - 1, most)) for least, most in reach]
    return Problem(
        tuple(made), tuple((f"limit{k}", a) for k, a in enumerate(amounts)), None, draw(groups), draw(groups)
    )


def networks(**kinds: Any) -> st.SearchStrategy[Problem]:
    """``random_problem`` from a drawn seed."""
    return st.integers(0, 2**32 - 1).map(lambda seed: random_problem(np.random.default_rng(seed), **kinds))
