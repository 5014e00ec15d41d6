"""Which sizes of a file's inputs are to vary, and what they are called.

Asked for are the number of samples, every size that varies in the calibration data, and those that the user names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import nn

from quantkit.backends.onnxruntime.conditions import Condition
from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.program.input_shapes import InputShapes, Place, input_shapes, resized, varying_places
from quantkit.program.inputs import Batch, batch_size, first_samples
from quantkit.program.intercept import tensors_of

BATCH = "batch"
SEQUENCE = "sequence"
Named = Mapping[str, Mapping[int, str]]  # input -> axis -> name
_MOST_SAMPLES = 32  # of a batch that a file is compared on because of its sizes
_SMALLEST = 2  # torch.export takes a size of 1 for a constant
_IMAGE = {3: (SEQUENCE,) * 2, 4: ("channels", "height", "width"), 5: ("channels", "depth", "height", "width")}


@dataclass(frozen=True)
class DynamicSizes:
    """``named``: what the user wants to vary; ``seen``: batches of other sizes than the example's."""

    named: Named = field(default_factory=dict)
    seen: Sequence[Batch] = ()


@dataclass(frozen=True)
class Asked:
    """The sizes of an example's inputs that are to vary: ``batch`` where they are the number of samples, ``named`` by
    the user, ``varying`` among ``seen`` batches.
    """

    example: Batch
    shapes: InputShapes
    integers: frozenset[str]
    batch: frozenset[Place]
    named: dict[Place, str]
    varying: frozenset[Place]
    seen: tuple[Batch, ...]

    @classmethod
    def of(cls, model: nn.Module, example: Batch, sizes: DynamicSizes) -> Asked:
        """Raises InvalidRequest for names of inputs and axes that the model does not have."""
        shapes = input_shapes(model, example)
        seen = (first_samples(batch, _MOST_SAMPLES) for batch in sizes.seen)
        forms = [(batch, form) for batch in seen if _alike(form := input_shapes(model, batch), shapes)]
        known = [(example, shapes), *forms]
        batch = frozenset(
            (name, 0)
            for name, shape in shapes.items()
            if shape and all(form[name][0] == batch_size(one) for one, form in known)
        )
        tensors = dict(zip(shapes, tensors_of(example), strict=True))
        return cls(
            example,
            shapes,
            frozenset(name for name, tensor in tensors.items() if not tensor.is_floating_point()),
            batch,
            named_places(sizes.named, shapes),
            frozenset(varying_places([form for _, form in known]) - batch),
            tuple(batch for batch, _ in forms),
        )

    @property
    def places(self) -> frozenset[Place]:
        """All sizes that are to vary."""
        return self.batch | self.varying | frozenset(self.named)

    def size(self, place: Place) -> int:
        """That of the example."""
        return self.shapes[place[0]][place[1]]

    def resized(self, batch: Batch, sizes: Mapping[Place, int]) -> Batch:
        """A batch as the example with other sizes."""
        return resized(batch, tuple(self.shapes), sizes)

    def traced_example(self, places: frozenset[Place]) -> Batch:
        """The example as torch.export needs it for these sizes to vary: with two samples, and no other size of one."""
        few = dict.fromkeys(self.batch & places, _SMALLEST) if self.batch <= places else {}
        longer = {place: _SMALLEST for place in places if self.size(place) < _SMALLEST}
        return self.resized(self.example, longer | few)

    def other_counts(self, places: frozenset[Place]) -> list[Batch]:
        """The example as it is given, and with twice the samples that it is traced on, where their number is to vary:
        of another number a model may make something else.
        """
        if not self.batch or not self.batch <= places:
            return []
        return [self.example, self.resized(self.example, dict.fromkeys(self.batch, 2 * _SMALLEST))]


def _alike(form: InputShapes, shapes: InputShapes) -> bool:
    return {name: len(shape) for name, shape in form.items()} == {name: len(shape) for name, shape in shapes.items()}


def named_places(named: Named, shapes: InputShapes) -> dict[Place, str]:
    """The sizes that the user names; raises InvalidRequest for what cannot be meant."""
    found: dict[Place, str] = {}
    for name, axes in named.items():
        if name not in shapes:
            raise InvalidRequest(
                f"dynamic= names the input {name!r}, which the model does not take.{did_you_mean(name, list(shapes))} "
                f"Its inputs: {', '.join(shapes)}."
            )
        if not isinstance(axes, Mapping):
            raise InvalidRequest(
                f"dynamic= gives {name!r} {axes!r}: give it axes with names, such as {{1: {SEQUENCE!r}}}."
            )
        for axis, label in axes.items():
            found[name, _axis(name, axis, shapes[name])] = _label(name, axis, label)
    for one, label in found.items():
        for other, size in ((o, shapes[o[0]][o[1]]) for o, same in found.items() if same == label):
            if size != shapes[one[0]][one[1]]:
                raise InvalidRequest(
                    f"dynamic= calls {_where(one)} and {_where(other)} {label!r}, and in the example they are "
                    f"{shapes[one[0]][one[1]]} and {size}: sizes that may differ need two names."
                )
    return found


def _axis(name: str, axis: Any, shape: Sequence[int]) -> int:
    if not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        raise InvalidRequest(
            f"dynamic= names axis {axis!r} of {name!r}, which has {len(shape)} axes in the example: its shape is "
            f"{tuple(shape)}."
        )
    return axis % len(shape)


def _label(name: str, axis: Any, label: Any) -> str:
    if not isinstance(label, str) or not label.isidentifier():
        raise InvalidRequest(
            f"dynamic= calls axis {axis} of {name!r} {label!r}: a size is called by a word, such as {SEQUENCE!r}."
        )
    return label


def _where(place: Place) -> str:
    return f"axis {place[1]} of {place[0]!r}"


@dataclass(frozen=True)
class TakenSizes:
    """The sizes that a traced model takes: ``sizes`` a whole number, or an expression in symbols where it varies, and
    the ``conditions`` on them; ``names`` what a varying one is called.
    """

    sizes: Mapping[Place, Any]
    conditions: Sequence[Condition] = ()
    names: Mapping[Place, str] = field(default_factory=dict)

    @property
    def dynamic(self) -> frozenset[Place]:
        """Those that vary."""
        return frozenset(place for place, size in self.sizes.items() if not isinstance(size, int))

    def by_input(self) -> dict[str, dict[int, str]]:
        """Input -> axis -> name of the sizes that vary."""
        found: dict[str, dict[int, str]] = {}
        for name, axis in self.sizes:
            if (name, axis) in self.names:
                found.setdefault(name, {})[axis] = self.names[name, axis]
        return found

    def texts(self) -> tuple[str, ...]:
        """The conditions in the names of sizes, but for what is true of sizes of one name."""
        texts = dict.fromkeys(condition.text(self._labels()) for condition in self.conditions)
        return tuple(text for text in texts if text != "True")

    def problem(self, shapes: InputShapes) -> str | None:
        """Why inputs of these shapes are not taken, None where they are."""
        symbols: dict[Any, tuple[int, Place]] = {}
        for place, taken in self.sizes.items():
            name, axis = place
            found = shapes[name][axis]
            if isinstance(taken, int) and found != taken:
                return f"{_where(place)} is {found}, and the file takes {taken} only"
            if not isinstance(taken, int) and taken.is_Symbol:
                size, first = symbols.setdefault(taken, (found, place))
                if size != found:
                    return f"{_where(first)} and {_where(place)} are {size} and {found}, and have to be the same"
        values = {symbol: size for symbol, (size, _) in symbols.items()}
        for place in self.dynamic:
            wanted = self.sizes[place].xreplace({symbol: sympy.Integer(size) for symbol, size in values.items()})
            if wanted.is_Integer and int(wanted) != shapes[place[0]][place[1]]:
                return f"{_where(place)} is {shapes[place[0]][place[1]]}, and has to be {wanted}"
        for condition in self.conditions:
            if not condition.holds(values):
                given = ", ".join(f"{self._labels().get(symbol, symbol)} {size}" for symbol, size in values.items())
                return f"the model's code needs {condition.text(self._labels())}, and is given {given}"
        return None

    def _labels(self) -> dict[Any, str]:
        return {self.sizes[place]: name for place, name in self.names.items() if self.sizes[place].is_Symbol}


def names_of(asked: Asked, sizes: Mapping[Place, Any]) -> dict[Place, str]:
    """What every size that varies is called: as the user says, else by what it is; the same for sizes that are the
    same in the graph, and something else for others, but for the number of samples.

    Raises InvalidRequest where the user has two names for one size.
    """
    groups: dict[Any, list[Place]] = {}
    for place, size in sizes.items():
        if not isinstance(size, int):
            groups.setdefault(size, []).append(place)
    names: dict[Place, str] = {}
    taken = set(asked.named.values())
    for places in groups.values():
        given = {asked.named[place]: place for place in places if place in asked.named}
        if len(given) > 1:
            (one, first), (other, second), *_ = given.items()
            raise InvalidRequest(
                f"dynamic= calls {_where(first)} {one!r} and {_where(second)} {other!r}, and the model's code needs "
                "them to be the same: give them one name."
            )
        label = next(iter(given), None) or _default_name(asked, places, taken)
        if label != BATCH or places[0] not in asked.batch:
            taken.add(label)
        names |= dict.fromkeys(places, label)
    return names


def _default_name(asked: Asked, places: Sequence[Place], taken: set[str]) -> str:
    """What a size is called that the user does not name."""
    _, role, name = min((*_role(asked, place), place[0]) for place in places)
    tried = (role, f"{name}_{role}", *(f"{name}_{role}_{count}" for count in range(2, len(taken) + 3)))
    return next(one for one in tried if one not in taken)


def _role(asked: Asked, place: Place) -> tuple[int, str]:
    """(rank among the roles of one size, what it is) of the size of an input along an axis: sequences of tokens come
    first, since masks of any form follow them.
    """
    (name, axis), rank = place, len(asked.shapes[place[0]])
    if place in asked.batch:
        return 0, BATCH
    if name in asked.integers:
        return (1, SEQUENCE) if (rank, axis) == (2, 1) else (4, f"size_{axis}")
    if rank in _IMAGE and axis:
        last = rank == 4 and ((name, 1) in asked.places and (name, 3) not in asked.places)  # channels last
        return 2, _IMAGE[rank][axis if last else axis - 1]
    return (3, SEQUENCE) if (rank, axis) == (2, 1) else (4, f"size_{axis}")
