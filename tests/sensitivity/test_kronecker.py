"""Kronecker factors beside gradients of one sample at a time, by the weights themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantkit
from quantkit.rounding.moments import damped
from quantkit.sensitivity.kronecker import (
    DAMPING,
    FisherInputs,
    draws_for,
    kronecker_moments,
    layers_with_factors,
    products_between,
)
from quantkit.session import Session
from quantkit.stages.inputs import Inputs
from quantkit.targets import Target

SAMPLES, LENGTH, WORDS = 6, 5, 11
DRAWS = draws_for(SAMPLES * LENGTH)


class TinyLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.mix = nn.Linear(8, 12)
        self.back = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, WORDS, bias=False)

    def forward(self, tokens):
        x = self.words(tokens)
        x = x + x.cumsum(1) / 3
        return self.head(torch.tanh(x + self.back(torch.relu(self.mix(x)))))


def model_and_data(seed=0):
    torch.manual_seed(seed)
    model = TinyLanguageModel().eval()
    return model, torch.randint(0, WORDS, (SAMPLES, LENGTH))


def session_of(model, tokens):
    return Session.open(model, Inputs.of(model, [tokens], None, None), Target.load("onnxruntime-cpu"))


def factors(session, names, seed=0):
    ready, damage = session.prepared, session.reference("auto").damage
    given = FisherInputs(ready.model, ready.program, session.inputs.batches, damage)
    return kronecker_moments(given, names, torch.Generator().manual_seed(seed), progress=False)


def gradients_of_samples(model, tokens, weight, generator):
    """A gradient for each sample and draw, of the log-likelihood of labels drawn for all of them in turn."""
    logits = model(tokens)
    p = logits.detach().reshape(-1, WORDS).softmax(-1)
    found = []
    for _ in range(DRAWS):
        labels = torch.multinomial(p, 1, generator=generator).reshape(SAMPLES, LENGTH, 1)
        likely = logits.log_softmax(-1).gather(-1, labels).sum((1, 2))
        found += [torch.autograd.grad(one, weight, retain_graph=True)[0].double() for one in likely]
    return found


def test_factors_are_those_of_gradients_of_one_sample_at_a_time():
    model, tokens = model_and_data()
    found = factors(session_of(model, tokens), ["mix"])["mix"]

    generator = torch.Generator().manual_seed(0)
    first = gradients_of_samples(model, tokens, model.mix.weight, generator)
    inputs, outputs = sum(g.T @ g for g in first), sum(g @ g.T for g in first)
    one, other = (torch.linalg.inv(damped(x[None], DAMPING)[0]) for x in (inputs, outputs))
    again = gradients_of_samples(model, tokens, model.mix.weight, generator)
    assert torch.allclose(found.hessian[0], sum(g.T @ other @ g for g in again), rtol=1e-3, atol=1e-6)
    assert torch.allclose(found.output[0], sum(g @ one @ g.T for g in again), rtol=1e-3, atol=1e-6)


def test_the_factor_of_a_table_is_that_of_gradients_by_what_is_looked_up():
    model, tokens = model_and_data()
    found = factors(session_of(model, tokens), ["words"])["words"]
    assert found.table and found.output is None

    seen = []
    model.words.register_forward_hook(lambda _, inputs, out: seen.append(out.requires_grad_()) or out)
    labels = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(2 * DRAWS):
        logits = model(tokens)
        p = logits.detach().reshape(-1, WORDS).softmax(-1)
        drawn = torch.multinomial(p, 1, generator=labels)
        likely = logits.log_softmax(-1).reshape(-1, WORDS).gather(-1, drawn).sum()
        slope = torch.autograd.grad(likely, seen[-1])[0].reshape(-1, 8).double()
        rows.append(slope.T @ slope)
    assert torch.allclose(found.hessian[0], sum(rows[DRAWS:]), rtol=1e-3, atol=1e-6)  # the second pass counts


def test_layers_that_make_an_output_have_none():
    model, tokens = model_and_data()
    program = session_of(model, tokens).prepared.program
    assert layers_with_factors(program, ["words", "mix", "back", "head"], 1 << 30) == ["words", "mix", "back"]
    assert layers_with_factors(program, ["words", "mix", "back"], 8 * 8 * 8) == ["words"]


def test_results_do_not_depend_on_the_size_of_batches():
    model, tokens = model_and_data()
    whole = factors(session_of(model, tokens), ["mix"])["mix"]
    inputs = Inputs.of(model, [tokens[:2], tokens[2:]], None, None)
    session = Session.open(model, inputs, Target.load("onnxruntime-cpu"))
    parts = factors(session, ["mix"])["mix"]
    assert torch.dist(whole.hessian, parts.hessian) < 0.5 * whole.hessian.norm()  # other labels are drawn


@pytest.mark.parametrize(("scheme", "rounding"), [("w4g4z", "yaqa"), ("w4a8", "yaqa"), ("w8a8", "gptq")])
def test_narrow_weights_of_models_that_read_tokens_are_rounded_by_the_loss(scheme, rounding):
    model, tokens = model_and_data()
    options = {"reconstruction": "none", "correction": None, "progress": False, "transforms": "none"}
    result = quantkit.quantize(model, scheme, tokens, **options)
    assert result.notes["rounding"]["mix"].startswith(rounding)
    assert result.notes["rounding"]["words"].startswith("yaqa") == (rounding == "yaqa")
    again = quantkit.quantize(model, scheme, tokens, **options)
    assert torch.equal(result.model(tokens), again.model(tokens))


def test_profiles_round_layer_by_layer_what_is_rounded_by_the_loss_in_the_end():
    model, tokens = model_and_data()
    options = {"reconstruction": "none", "correction": None, "progress": False, "transforms": "none"}
    result = quantkit.quantize(model, "10 bits", tokens, schemes=["w4g4z", "w6g4z"], **options)
    assert result.profile.provenance["rounded"]["mix"].startswith("gptq")
    assert result.notes["rounding"]["mix"].startswith("yaqa")


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("with_middle", [False, True])
def test_short_and_long_samples_have_the_same_products(rows, with_middle):
    generator = torch.Generator().manual_seed(0)
    read, slopes, middle = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((4, rows, 5), (4, rows, 6), (6, 6))
    )
    gradients = torch.einsum("nto,ntk->nok", slopes, read)
    wanted = torch.einsum("nok,op,npl->kl", gradients, middle if with_middle else torch.eye(6).double(), gradients)
    assert torch.allclose(products_between(read, slopes, middle if with_middle else None), wanted)


def test_labels_are_drawn_more_often_where_there_are_few_rows():
    assert [draws_for(rows) for rows in (0, 100, 10_000, 20_000, 1 << 15, 1 << 20)] == [4, 4, 3, 1, 1, 1]


def test_a_table_that_is_the_head_too_has_none():
    model, tokens = model_and_data()
    model.head = torch.nn.Linear(8, WORDS, bias=False)
    model.head.weight = model.words.weight
    session = session_of(model, tokens)
    layers = session.prepared.quantizable
    assert layers_with_factors(session.prepared.program, layers, 1 << 30) == ["mix", "back"]
    options = {"reconstruction": "none", "correction": None, "progress": False, "transforms": "none"}
    assert quantkit.quantize(model, "w4g4z", tokens, **options).notes["rounding"]["mix"].startswith("yaqa")
