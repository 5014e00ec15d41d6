"""A plan is returned if it does less damage than the best plan with one scheme for all layers, on inputs held back.

Searches can lose to their own baseline: predictions err, and where a budget is just met by a uniform scheme there is
little to gain. So the plan and the uniform ones that the profile predicts best within the same limits are rounded on
three quarters of the calibration samples and measured on the others, or rounded and measured on all where rounding
does not look at inputs. In doubt, within a standard error, a uniform plan is returned
(docs/methods/against-uniform.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from quantkit.allocation.from_profile import candidates
from quantkit.errors import InfeasibleBudget
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile
from quantkit.program.inputs import Batch, batch_size, numbered_samples
from quantkit.progress import notice
from quantkit.reconstruction.snapshot import Cache
from quantkit.rounding import rounding_of
from quantkit.sensitivity.damage import Reference, RunningDamage
from quantkit.sensitivity.inputs import mixed_pairs
from quantkit.sensitivity.measure import Subject
from quantkit.session import Session
from quantkit.stages.apply import Application, formatted_by, schemes_to_check
from quantkit.stages.applying import PlanApplication
from quantkit.stages.auto import loss_for, with_auto_decided
from quantkit.stages.loss_moments import loss_moments
from quantkit.stages.recording import Replay, samples_by_size

MOST_TRIED = 2  # uniform plans
HELD_BACK = 4  # one sample in so many
LEAST_HELD = 4  # with fewer all samples are rounded and measured on
DRAWS = 4  # of mixes of the samples measured on, where they can be mixed: a network is too sure of them as they are
CLEARLY_BETTER = 0.5  # a predicted damage that is less than this share of a uniform plan's is not measured

Choose = Callable[[Profile], Plan]


def no_worse_than_uniform(
    session: Session, profile: Profile, plan: Plan, choose: Choose, asked: Application, on_codes: bool = False
) -> Plan:
    """``plan``, or a plan with one scheme for all where that does less damage; what was measured is in its provenance.
    ``choose`` gives the plan of a profile within the limits. ``on_codes``: only schemes with activations in codes, for
    limits that are about what runs on them.
    """
    found = [(scheme, one) for scheme, one in uniform_plans(profile, choose, on_codes) if one.schemes != plan.schemes]
    uniform = {str(scheme): one for scheme, one in found}
    tried = dict(sorted(uniform.items(), key=lambda item: _predicted(item[1]))[:MOST_TRIED])
    if not tried or _predicted(plan) < CLEARLY_BETTER * min(map(_predicted, tried.values())):
        return plan
    trials = _Trials.of(session, asked)
    own, others = trials.damage(plan), {name: trials.damage(found) for name, found in tried.items()}
    damages = {name: other.mean for name, other in others.items()}
    best = min(damages, key=damages.__getitem__)
    gain, error = others[best].since(own).mean_and_error
    record = {"damage": own.mean, "uniform": damages, "error": error, "samples": trials.held_samples}
    if gain >= error:
        return replace(plan, provenance=plan.provenance | {"against_uniform": record})
    notice(
        f"{best} for all layers that may take it does {damages[best]:.4g} of damage on {trials.held_samples} samples "
        f"and the plan that was chosen {own.mean:.4g}, not less by more than chance: the former is returned"
    )
    return replace(tried[best], provenance=tried[best].provenance | {"against_uniform": record | {"returned": best}})


def _predicted(plan: Plan) -> float:
    assert plan.predicted_damage is not None, "it was chosen by a profile"
    return plan.predicted_damage


def uniform_plans(profile: Profile, choose: Choose, on_codes: bool = False) -> Iterator[tuple[Scheme, Plan]]:
    """For every candidate the plan within the limits that gives it to all layers that may take it, if there is one."""
    offered = candidates(profile)
    for scheme in dict.fromkeys(s for options in offered.values() for s in options if not s.is_float):
        own = {name: profile.layers[name].carried_out(scheme) for name in offered}
        taking = [name for name, options in offered.items() if own[name] in options]
        if len(taking) < 2 or (on_codes and scheme.activation is None):
            continue
        fixed = {name: (str(own[name]),) for name in taking}
        others = {name: tuple(map(str, options)) for name, options in offered.items()}
        try:
            yield scheme, choose(replace(profile, candidates=others | fixed))
        except InfeasibleBudget:
            continue


@dataclass(frozen=True)
class _Trials:
    """A session whose samples to round on are some of the calibration samples, and the float outputs on the others."""

    session: Session
    reference: Reference
    asked: Application

    @classmethod
    def of(cls, session: Session, asked: Application) -> _Trials:
        kept, held = list(session.inputs.batches), list(session.inputs.batches)
        if rounding_of(asked.options.rounding).hessian:
            kept, held = held_back(session.inputs.batches)
        loss = loss_for(session, asked.options.loss)
        options = replace(asked.options, reconstruction="none", correction="none", loss=loss)
        asked = replace(asked, options=options, evaluate=None, inplace=False)
        ready, program = session.prepared, session.standing or session.prepared.program
        subject = Subject(ready.model, held, {}, loss, weights=ready.weights, program=program)
        drawn = [mixed_pairs(held, torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
        subject.batches = [batch for mixed in drawn if mixed is not None for batch in mixed] or held
        return cls(_on(session, kept), Reference.of(subject), asked)

    @property
    def held_samples(self) -> int:
        return sum(map(batch_size, self.reference.batches))

    def damage(self, plan: Plan) -> RunningDamage:
        """The damage of a plan, rounded on what is not held back."""
        own = self.session.fork()
        options = self.asked.options.with_inputs(own.inputs, schemes_to_check(plan, own))
        formatted = formatted_by(own, plan)
        recording, options = own.recording(formatted.ready), with_auto_decided(options, own, formatted)
        applying = PlanApplication.of(formatted, recording, self.reference, options, Cache())
        progress, rewritten = self.asked.run.progress, bool(applying.rewritten.notes)
        known = loss_moments(own, formatted.ready, options, progress, rewritten)
        simulated, _ = applying.quantized(progress, Cache(), known)
        measured = Subject(simulated, self.reference.batches, {}, rule=self.reference.damage.rule)
        return self.reference.damage_of(measured.outputs())


def _on(session: Session, batches: list[Batch]) -> Session:
    """A session with other calibration batches, on the same float model."""
    own = replace(session, inputs=replace(session.inputs, batches=batches), references={}, moments={})
    vars(own)["standing"] = session.standing
    if isinstance(replay := session.replay, Replay):
        samples = samples_by_size(batches)
        assert samples is not None, "as before some were held back"
        vars(own)["replay"] = Replay(replay.program, samples)
    return own


def held_back(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The batches without every fourth sample, and those samples; all of them twice where there are few."""
    if sum(map(batch_size, batches)) < HELD_BACK * LEAST_HELD:
        return list(batches), list(batches)
    kept = numbered_samples(batches, lambda order: order % HELD_BACK != HELD_BACK - 1)
    return kept, numbered_samples(batches, lambda order: order % HELD_BACK == HELD_BACK - 1)
