"""The verbs, in the order in which things happen: profile -> allocate -> apply, and quantize, which does it all.

What happens inside each is told by docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from quantkit.budget import Budget
from quantkit.formats import Scheme
from quantkit.plan import FLOAT_STORAGE, Plan, Profile
from quantkit.program.texts import as_tokens
from quantkit.program.updates import own_modes
from quantkit.progress import one_call, said
from quantkit.session import Session
from quantkit.stages.apply import Application, apply_plan, require_layers
from quantkit.stages.inputs import Inputs
from quantkit.stages.metric import Evaluate, require_metric
from quantkit.stages.options import (
    FLOAT16,
    FLOAT32,
    ApplyOptions,
    Run,
    Schemes,
    asked_transforms,
    require_choices,
)
from quantkit.stages.outliers import transformed, transformed_by
from quantkit.stages.profile import measure
from quantkit.stages.quantize import Search, candidates_of, quantize_request, transformed_within
from quantkit.stages.request import DEFAULT_TARGET, TargetName, make_ready
from quantkit.stages.result import Result
from quantkit.store import require_writable
from quantkit.targets import Target
from quantkit.targets.rules import Rules


@own_modes()
@one_call()
def quantize(
    model: nn.Module,
    budget: str | Scheme | Budget | Mapping[str, Any],
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    example_inputs: Any = None,
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    evaluate: Evaluate | None = None,
    target: TargetName = DEFAULT_TARGET,
    rules: Rules | None = None,
    first_last: str = "same",
    float_storage: str = "float32",
    sensitivity: str = "auto",
    solver: str = "auto",
    effort: str = "fast",
    rounding: str = "auto",
    ranges: str = "mse",
    transforms: str = "auto",
    reconstruction: str = "auto",
    correction: str | None = "auto",
    reparameterization: str = "auto",
    seed: int = 0,
    memory: str | None = None,
    progress: bool = True,
    workdir: str | Path | None = None,
    inplace: bool = False,
) -> Result:
    """The best model inside ``budget``: profile, allocate, apply, and a measured comparison with the float model.

    A scheme as budget ("w8a8", "w4") goes to every layer that can take it; the plan says why others stay float. Then,
    and wherever each layer has one candidate, nothing is profiled: limits are checked, and the one plan is applied. At
    8 bits, layers whose activations make most of the damage are left float afterwards, unless ``rules`` name them.

    Without ``calibration`` only weights are quantized, by what is known of them alone; ``example_inputs``, one batch
    of inputs, then lets the model be traced, which folds BatchNorm and counts operations.

    See ``profile`` and ``apply`` for the arguments; ``evaluate`` is only reported, unless the budget limits
    ``accuracy_drop``: then plans are chosen by it, first with the profile's codes; the cheapest of them and 2, 4 or 6
    still cheaper ones (with ``effort``) are applied, minutes each, since what is learned decides how small a plan may
    be. Otherwise "fast" takes the plan that the profile predicts best; "balanced" and "thorough" improve it by
    measuring around it, with at most 1.5 and 3 measurements per profiled format. Raises InvalidRequest for a bad
    request and InfeasibleBudget for one that cannot be met, both before anything is measured; AccuracyNotMet when no
    plan keeps the accuracy. ``memory``, as "4 GB", limits what is held beyond the model and its inputs: wide layers
    are rounded in more blocks of inputs then, and a warning says where that is not enough.
    """
    run = _run(progress, workdir)
    how = ApplyOptions(rounding, ranges, reconstruction, correction or "none", loss, seed, reparameterization, memory)
    search = Search.of(budget, solver, effort, Application(how, evaluate, run, inplace))
    request = make_ready(
        model, as_tokens(model, calibration, tokenizer, samples), example_inputs=example_inputs, samples=samples,
        **candidates_of(search.limit, schemes), target=target, rules=rules, first_last=first_last,
        float_storage=float_storage, loss=loss, sensitivity=sensitivity, rounding=rounding, ranges=ranges, seed=seed,
        memory=memory, transforms=transforms,
    )  # fmt: skip
    return _with_notices(quantize_request(transformed_within(request, search, transforms), search))


@own_modes()
@one_call()
def profile(
    model: nn.Module,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    example_inputs: Any = None,
    schemes: Schemes | None = None,
    samples: int | None = None,
    loss: str = "auto",
    target: TargetName = DEFAULT_TARGET,
    rules: Rules | None = None,
    first_last: str = "same",
    float_storage: str = "float32",
    sensitivity: str = "auto",
    rounding: str = "auto",
    ranges: str = "mse",
    transforms: str = "auto",
    seed: int = 0,
    memory: str | None = None,
    progress: bool = True,
    workdir: str | Path | None = None,
) -> Profile:
    """Measure what each format of each layer and site costs, alone and in pairs.

    ``calibration``: any iterable of model inputs (tensor, tuple or dict items), labels not needed; ``samples`` caps
    it. With a ``tokenizer``, of transformers or of tokenizers, it is a list of texts, cut to what tokenizer and model
    take. Without it only weights are quantized, by the error of the weights; ``example_inputs``, one batch of inputs,
    then lets the model be traced, which folds BatchNorm and counts operations. ``schemes``: candidate schemes, default
    the target's. ``rules``: ordered (pattern, scheme or schemes), a later one wins. ``first_last``: "8 bits" gives
    layers that no layer stands before, or behind, 8 bits for weights and inputs, unless a rule matches them; with
    "same" they are as all others; either way the plan says so. ``float_storage``: what stays float, weights, biases
    and norms, is stored as "float32" or as "float16", where that can hold it; its size counts so, and the quantized
    model computes with the rounded values. ``loss``: "kl", "mse" or "auto". ``transforms`` change the float model,
    which computes what it computed, so that outliers cost less: "auto" makes those that lower the damage of the
    narrowest formats on samples held back, those named, joined by commas, are made wherever they are exact, with
    "none" nothing is changed. Plans say which were made.
    With ``workdir`` the profile is kept there under a key of everything it depends on and reused when nothing
    changed; until it is complete, every finished layer is, so that a run that was killed resumes. ``memory`` as for
    ``quantize``. Raises InvalidRequest before any measuring when the request cannot be carried out.
    """
    run = _run(progress, workdir)
    request = make_ready(
        model, as_tokens(model, calibration, tokenizer, samples), example_inputs=example_inputs, samples=samples,
        schemes=schemes, target=target, rules=rules, first_last=first_last, float_storage=float_storage, loss=loss,
        sensitivity=sensitivity, rounding=rounding, ranges=ranges, seed=seed, memory=memory, transforms=transforms,
    )  # fmt: skip
    return measure(transformed(request, transforms), run)


@own_modes()
@one_call()
def apply(
    model: nn.Module,
    plan: Plan | Mapping[str, str | Scheme],
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    example_inputs: Any = None,
    samples: int | None = None,
    target: TargetName = DEFAULT_TARGET,
    float_storage: str | None = None,
    rounding: str = "auto",
    ranges: str = "mse",
    transforms: str = "auto",
    reconstruction: str = "auto",
    correction: str | None = "auto",
    reparameterization: str = "auto",
    loss: str = "auto",
    evaluate: Evaluate | None = None,
    seed: int = 0,
    memory: str | None = None,
    progress: bool = True,
    workdir: str | Path | None = None,
    inplace: bool = False,
) -> Result:
    """Quantize ``model`` by ``plan`` (a Plan, or a mapping layer name -> scheme; layers not named stay float).

    Layers are rounded one after the other, each on the inputs it gets from the network quantized so far. Then codes,
    scales, biases and activation steps are learned by the damage of the output, on mixes of the calibration inputs:
    ``reconstruction="network"``; "block" learns block by block first, "adaquant" and "adaquant-parallel" only
    layer by layer, "none" keeps what was rounded. "auto" learns where there are at least 64 samples: blocks first for
    weights of up to 3 bits or activations below 8, the network alone for weights of up to 5 bits. Where
    nothing is learned, ``correction="auto"`` moves scales and biases by statistics ("norm", "bias") and biases by the
    damage ("tuning"). Each can be asked for alone, as can "confidence", a factor on logits, also after learning; None
    is off. What does not help on inputs that were held back is undone; ``Result.notes`` says what did. Images are also
    learned from mirrored and shifted, where the float outputs hardly change.

    ``reparameterization`` is for transformers. Before anything is rounded, outputs of LayerNorms get a range for each
    channel ("norm"), its clipping learned ("clip"), and norms and the layers behind them are rewritten so that one
    range does the same, where that lowers the error behind them; linear layers divide what they read by a ratio for
    each channel, by which their weights are multiplied, where that does ("reads"); 4-bit probabilities of attention
    get logarithmic codes ("softmax"). Joined by +; "auto" is "clip+reads+softmax", reads in models with norms.

    ``tokenizer`` as for ``profile``. ``evaluate`` (model -> a number, or one for each sample, higher is better) is
    reported for the float and for the quantized model; it must not use the calibration data. Without ``calibration``
    plans of weights alone are met, by HQQ; ``example_inputs`` then lets BatchNorm be folded. With ``workdir`` every
    layer is kept there as soon as it is rounded, and every block, correction and the network as soon as it is learned,
    under a key of everything they depend on: the same call again, after a kill or not, does none of that twice.
    ``memory`` as for ``quantize``. ``float_storage`` as for ``profile``; None: as the plan was made for.
    ``transforms`` as for ``profile``; "auto" makes those of the plan again, from the same data, and decides for a
    mapping.
    Raises InvalidRequest for a plan that does not fit the model or the target.
    """
    goal, decided = Target.load(target), Plan.of(plan)
    floats = float_storage or decided.provenance.get(FLOAT_STORAGE, FLOAT32)
    require_choices(float_storage=floats)
    asked_transforms(transforms)
    how = ApplyOptions(rounding, ranges, reconstruction, correction or "none", loss, seed, reparameterization, memory)
    require_metric(evaluate)
    asked = Application(how, evaluate, _run(progress, workdir), inplace)
    require_layers(model, decided, goal)
    inputs = Inputs.of(model, as_tokens(model, calibration, tokenizer, samples), example_inputs, samples)
    coded = [scheme for scheme in decided.schemes.values() if scheme.activation is not None]
    how.with_inputs(inputs, coded or decided.schemes.values())  # of layers with weights alone more is known later
    session = Session.open(model, inputs, goal)
    session = session.storing_halves() if floats == FLOAT16 else session
    decided = transformed_by(session, decided, transforms, how)
    return _with_notices(apply_plan(session, decided, asked))


def _with_notices(result: Result) -> Result:
    """The result with what was said on the way."""
    return replace(result, notes=result.notes | {"notices": said()})


def _run(progress: bool, workdir: str | Path | None) -> Run:
    """How to run; raises InvalidRequest for a working directory that cannot be written to."""
    return Run(progress, None if workdir is None else require_writable(workdir))
