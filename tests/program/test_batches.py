"""Calibration data in every form users have it, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import (
    batch_size,
    digest_batches,
    digest_model,
    first_samples,
    read_batches,
    split_batches,
)
from tests.program.models import randn


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, image, mask=None, *, scale=1.0):
        return image


class AnyArguments(nn.Module):
    def forward(self, *inputs, **others):
        return inputs


X = randn(3, 4)
Y = torch.arange(3)


@pytest.mark.parametrize(
    ("model", "item", "args", "kwargs"),
    [
        (One(), X, [X], {}),
        (One(), (X,), [X], {}),
        (One(), [X], [X], {}),
        (Two(), (X, Y), [X, Y], {}),
        (Two(), {"image": X, "scale": 2.0}, [], {"image": X, "scale": 2.0}),
        (AnyArguments(), (X, Y, X), [X, Y, X], {}),
    ],
)
def test_an_item_becomes_arguments(model, item, args, kwargs) -> None:
    ((found, named),) = read_batches(model, [item])
    assert len(found) == len(args)
    assert all(torch.equal(a, b) for a, b in zip(found, args, strict=True))
    assert named.keys() == kwargs.keys()
    assert all(a is b or torch.equal(a, b) for a, b in zip(named.values(), kwargs.values(), strict=True))


def test_one_tensor_or_dict_is_one_batch() -> None:
    assert [batch_size(b) for b in read_batches(One(), X)] == [3]
    assert [b[1].keys() for b in read_batches(Two(), {"image": X})] == [{"image"}]


def test_keywords_come_in_one_order() -> None:
    one, other = read_batches(AnyArguments(), [{"a": X, "b": Y}, {"b": Y, "a": X}])
    assert list(one[1]) == list(other[1])


def test_labels_are_dropped_with_a_notice(caplog) -> None:
    with caplog.at_level(logging.INFO, "quantkit"):
        batches = read_batches(One(), [(X, Y, Y)])
    assert [len(args) for args, _ in batches] == [1]
    assert "carry 2 more value(s) than the model takes (labels?): not used" in caplog.text


class Labelled(nn.Module):
    def forward(self, x, labels=None):
        return x


class Target(nn.Module):
    def forward(self, x, lengths, noise=None, y_true=None, mask=None):
        return x


@pytest.mark.parametrize(("model", "item", "kept"), [(Labelled(), (X, Y), 1), (Target(), (X, Y, X, Y, X), 3)])
def test_an_optional_argument_for_labels_is_not_filled(model, item, kept: int, caplog) -> None:
    with caplog.at_level(logging.INFO, "quantkit"):
        ((args, _),) = read_batches(model, [item])
    assert len(args) == kept
    assert f"carry {len(item) - kept} more value(s) than the model takes (labels?): not used" in caplog.text


def test_what_fills_optional_arguments_is_said(caplog) -> None:
    with caplog.at_level(logging.INFO, "quantkit"):
        read_batches(Two(), [(X,), (X, Y)])
    assert "fill the optional argument mask of the model's forward too" in caplog.text


def test_no_notice_without_surplus(caplog) -> None:
    with caplog.at_level(logging.INFO, "quantkit"):
        read_batches(Two(), [(X,), {"image": X, "mask": Y}])
        read_batches(AnyArguments(), [(X, Y, Y)])
    assert caplog.text == ""


def test_arrays_count_as_tensors() -> None:
    array, labels = X.numpy(), Y.numpy()
    forms = [array, [array], [(array,)], [[array]], [{"x": array}], (array,), iter([array]), [array.astype("float64")]]
    for form in forms:
        ((args, kwargs),) = read_batches(One(), form)
        assert torch.equal((*args, *kwargs.values())[0], X)
    (((nested, found), _),) = read_batches(Two(), [([array, labels], {"a": labels})])
    assert torch.equal(nested[0], X)
    assert torch.equal(nested[1], Y)
    assert torch.equal(found["a"], Y)


@pytest.mark.parametrize("view", [lambda x: x[::-1], lambda x: x.T, lambda x: x.astype(">f4")])
def test_arrays_of_any_layout_are_copied(view) -> None:
    array = view(X.numpy().copy())
    array.flags.writeable = False
    ((args, _),) = read_batches(One(), [array])
    assert np.array_equal(args[0].numpy(), array)


def test_data_loader_is_read_in_its_order() -> None:
    data = torch.arange(20.0).reshape(10, 2)
    loader = DataLoader(TensorDataset(data, torch.arange(10)), batch_size=4)
    batches = read_batches(One(), loader)
    assert [batch_size(b) for b in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([args[0] for args, _ in batches]), data)


def test_generator_is_read_once_and_no_further_than_needed() -> None:
    read = []

    def stream():
        for i in range(1000):
            read.append(i)
            yield torch.full((2, 3), float(i))

    batches = read_batches(One(), stream(), samples=5)
    assert read == [0, 1, 2]
    assert [batch_size(b) for b in batches] == [2, 2, 1]
    assert [b[0][0][0, 0].item() for b in batches] == [0, 1, 2]


def test_iterator_that_fills_the_same_memory_again_is_copied() -> None:
    def stream():
        buffer = torch.empty(2, 3)
        for i in range(3):
            yield buffer.fill_(i)

    assert [args[0][0, 0].item() for args, _ in read_batches(One(), stream())] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_inputs_become_float32(dtype) -> None:
    ((_, kwargs),) = read_batches(Two(), [{"image": X.to(dtype), "mask": [X.to(dtype), Y, Y > 1]}])
    assert kwargs["image"].dtype == kwargs["mask"][0].dtype == torch.float32
    assert torch.equal(kwargs["image"], X.to(dtype).float())
    assert [t.dtype for t in kwargs["mask"][1:]] == [torch.int64, torch.bool]
    assert not kwargs["image"].requires_grad


def test_gradient_history_is_dropped() -> None:
    ((args, _),) = read_batches(One(), [X.clone().requires_grad_() * 2])
    assert not args[0].requires_grad


@pytest.mark.parametrize("samples", [1, 3, 4, 7, 100])
def test_samples_caps_across_batches_of_different_sizes(samples: int) -> None:
    data = torch.arange(9.0).reshape(9, 1)
    batches = read_batches(Two(), [(x, x.int()) for x in data.split([2, 4, 3])], samples)
    kept = torch.cat([args[0] for args, _ in batches])
    assert torch.equal(kept, data[:samples])
    assert torch.equal(torch.cat([args[1] for args, _ in batches]), data[:samples].int())


def test_values_that_are_not_per_sample_stay_whole() -> None:
    batch = ((X, torch.arange(7)), {"scale": 2.0, "zero": torch.tensor(1.0), "mask": None})
    args, kwargs = first_samples(batch, 2)
    assert [len(a) for a in args] == [2, 7]
    assert kwargs["scale"] == 2.0
    assert kwargs["zero"].item() == 1.0


@pytest.mark.parametrize("calibration", [[], iter(()), [torch.empty(0, 4)], torch.empty(0, 4)])
def test_empty_data_is_refused(calibration) -> None:
    with pytest.raises(InvalidRequest, match=r"calibration data (is empty|has no samples: .*)\. Pass a few hundred"):
        read_batches(One(), calibration)


def test_empty_batch_between_others_is_left_out() -> None:
    assert [batch_size(b) for b in read_batches(One(), [X, torch.empty(0, 4), X[:1]])] == [3, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_inputs_are_refused_with_the_number_of_the_batch(value: float) -> None:
    bad = X.clone()
    bad[1, 2] = value
    with pytest.raises(
        InvalidRequest, match=r"Calibration batch 2 contains NaN or infinite values\. Remove or repair"
    ):
        read_batches(Two(), [X, X, {"image": X, "mask": [bad]}])


def test_what_lies_beyond_the_cap_is_not_judged() -> None:
    bad = torch.full((1, 4), float("nan"))
    assert batch_size(read_batches(One(), [torch.cat([X, bad])], samples=3)[0]) == 3


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (3, "calibration must be an iterable of model inputs, not int"),
        ("data.npy", "item must be a tensor, a tuple of arguments or a dict of keywords, not str"),
        (TensorDataset(X, Y), "not TensorDataset. Pass torch.utils.data.DataLoader"),
        ((X, Y), r"tuple of tensors that differ.*Pass \[\(x, y\)\]"),
        ((X.numpy(), X[0].numpy()), r"tuple of tensors that differ.*Pass \[\(x, y\)\]"),
        (np.array(["a"]), "holds <U1, which is no type of numbers.*astype"),
        ([(X, np.array([None]))], "holds object, which is no type of numbers.*astype"),
        ([torch.eye(3).to_sparse()], "batch 0 contains a sparse or nested tensor: pass it dense"),
    ],
)
def test_other_data_is_refused_in_words(calibration, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_batches(One(), calibration)


def test_samples_below_one_and_models_that_are_none_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="samples=0 is no number of samples: pass a whole one from 1"):
        read_batches(One(), [X], samples=0)
    with pytest.raises(InvalidRequest, match=r"must be a torch\.nn\.Module, not function"):
        read_batches(lambda x: x, [X])  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
def test_split_keeps_all_samples_in_order(size: int) -> None:
    data = torch.arange(15.0).reshape(15, 1)
    batches = read_batches(Two(), [{"image": x, "mask": x.int()} for x in data.split([7, 1, 5, 2])])
    found = split_batches(batches, size)
    assert max(batch_size(b) for b in found) <= size
    assert torch.equal(torch.cat([kwargs["image"] for _, kwargs in found]), data)
    assert torch.equal(torch.cat([kwargs["mask"] for _, kwargs in found]), data.int())


def test_batch_with_values_that_are_not_per_sample_is_not_split() -> None:
    for extra in (torch.arange(7), torch.tensor(1)):
        batch = ((X, extra), {})
        assert split_batches([batch], 1) == [batch]
    for extra in (2.0, None, True):  # the same for all samples
        found = split_batches([((X, extra), {})], 1)
        assert [(len(args[0]), args[1]) for args, _ in found] == [(1, extra)] * len(X)


def test_digest_depends_on_the_bytes_alone() -> None:
    base = digest_batches([((X,), {"mask": Y})])
    assert len(base) == 16
    assert digest_batches([((X.clone(),), {"mask": Y})]) == base
    assert digest_batches([((X.t().contiguous().t(),), {"mask": Y})]) == base
    assert digest_batches([((X.clone().requires_grad_(False),), {"mask": Y})]) == base
    changed = X.clone()
    changed[2, 3] = torch.nextafter(changed[2, 3], torch.tensor(9.0))
    others = [
        [((changed,), {"mask": Y})],
        [((X,), {"mask": Y.int()})],
        [((X,), {"mask": Y + 1})],
        [((X.reshape(4, 3),), {"mask": Y})],
        [((X[:1],), {}), ((X[1:],), {})],
        [((X,), {"mask": 1})],
        [((X,), {"other": Y})],
        [((X, Y), {})],
    ]
    assert len({base, *map(digest_batches, others)}) == 9


def test_digest_is_that_of_the_described_bytes() -> None:
    structure = str(tree_flatten(((X,), {}))[1]).encode()
    expected = hashlib.sha256(structure + b"(torch.float32, (3, 4))" + X.numpy().tobytes()).hexdigest()[:16]
    assert digest_batches([((X,), {})]) == expected


def test_digest_of_a_model_sees_values_names_and_class_not_identity() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    same = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    same.load_state_dict(model.state_dict())
    assert digest_model(same) == digest_model(model) == digest_model(model.eval())
    renamed = nn.Sequential()
    renamed.add_module("a", model[0])
    renamed.add_module("1", model[1])
    with torch.no_grad():
        same[1].running_mean[0] += 1
    assert (
        len({digest_model(m) for m in (model, same, renamed, nn.ModuleList(model), copy.deepcopy(model).double())})
        == 5
    )


def test_digest_of_a_model_sees_tensors_that_are_no_part_of_its_state() -> None:
    model = nn.Linear(2, 2)
    digests = {digest_model(model)}
    model.register_buffer("angles", torch.ones(3), persistent=False)
    digests.add(digest_model(model))
    model.angles[1] = 2
    digests.add(digest_model(model))
    model.mask = torch.ones(2)
    digests.add(digest_model(model))
    model.mask[0] = 0
    assert len({*digests, digest_model(model)}) == 5


def test_digest_of_a_model_with_state_that_is_no_tensor() -> None:
    class Extra(nn.Linear):
        version = 1

        def get_extra_state(self):
            return {"version": self.version}

    model = Extra(2, 2)
    before = digest_model(model)
    model.version = 2
    assert digest_model(model) != before


def test_data_without_samples_is_told_from_no_data() -> None:
    model = nn.Linear(8, 4)
    with pytest.raises(InvalidRequest, match=r"calibration data is empty\. Pass a few hundred"):
        read_batches(model, [])
    with pytest.raises(
        InvalidRequest, match="has no samples: its 2 items have no tensor with some along its first axis"
    ):
        read_batches(model, [torch.tensor(1.0), torch.tensor(2.0)])
    with pytest.raises(InvalidRequest, match=r"samples=5\.5 is no number of samples"):
        read_batches(model, torch.randn(8, 8), samples=5.5)  # type: ignore[arg-type]
