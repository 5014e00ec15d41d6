"""Which schemes each layer may take: the request's candidates, the user's rules, what the target can run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from quantkit.errors import InvalidRequest, did_you_mean
from quantkit.formats import ActivationFormat, Scheme, check_group
from quantkit.plan import Layer
from quantkit.targets import Target

Wanted = str | Scheme | Sequence[str | Scheme]
Rules = Mapping[str, Wanted] | Sequence[tuple[str, Wanted]]


def parse_schemes(schemes: Iterable[str | Scheme] | None, target: Target) -> tuple[Scheme, ...]:
    """The candidate schemes of a request, or the target's defaults, without repeats. Raises InvalidRequest with every
    candidate the target cannot run and why."""
    if isinstance(schemes, str):
        schemes = schemes.replace(",", " ").split()
    elif schemes is not None and not isinstance(schemes, Iterable):
        raise InvalidRequest(f"schemes is a list such as ['w4a8', 'w8a8'], not {schemes!r}.")
    parsed = tuple(dict.fromkeys(Scheme.parse(s) for s in (target.default_schemes if schemes is None else schemes)))
    if not parsed:
        raise InvalidRequest("schemes is empty: name at least one candidate, such as 'w8a8'.")
    refused = [reason for scheme in parsed if (reason := target.refusal(scheme))]
    if refused:
        raise InvalidRequest(
            "; ".join(refused) + f". Candidates that can run: {', '.join(target.default_schemes)}, float."
        )
    return parsed


def weights_only(schemes: Iterable[Scheme]) -> tuple[Scheme, ...]:
    """The schemes with float activations, without repeats."""
    return tuple(dict.fromkeys(scheme.with_activation(None) for scheme in schemes))


def candidate_schemes(
    layers: Mapping[str, Layer], schemes: Iterable[str | Scheme] | None, rules: Rules | None, target: Target
) -> dict[str, tuple[Scheme, ...]]:
    """The schemes each layer that can be quantized may take; a later rule overrides an earlier one.

    A rule for layers that stay float anyway (``Layer.reason``) has to allow float. Raises InvalidRequest when one does
    not, a rule's pattern matches no layer, a candidate cannot run on the target, or a group size does not fit a layer.
    """
    default = parse_schemes(schemes, target)
    allowed = {name: default for name, layer in layers.items() if not layer.reason}
    for pattern, value in rule_pairs(rules):
        matched = matching(pattern, layers)
        if not matched:
            raise InvalidRequest(
                f"The rule {pattern!r} matches no layer.{did_you_mean(pattern.strip('*'), list(layers))} "
                f"Layers: {', '.join(list(layers)[:8])}{', ...' if len(layers) > 8 else ''}."
            )
        wanted = _schemes_of(value, target)
        obeying = [name for name in matched if name in allowed]
        if not obeying and not any(scheme.is_float for scheme in wanted):
            first = matched[0]
            raise InvalidRequest(
                f"The rule {pattern!r} asks for {', '.join(map(str, wanted))}, and {first!r} stays float: "
                f"{layers[first].reason}. Leave the rule out or ask for 'float'."
            )
        allowed.update(dict.fromkeys(obeying, wanted))
    allowed = {n: tuple(dict.fromkeys(map(layers[n].carried_out, wanted))) for n, wanted in allowed.items()}
    for name, wanted in allowed.items():
        for scheme in wanted:
            if scheme.weight is not None:
                check_group(name, scheme.weight, layers[name].shape)
    return allowed


def require_runnable(rules: Rules | None, target: Target) -> None:
    """Raise InvalidRequest for what is no rule and for one that asks for a scheme that the target cannot run."""
    for _, value in rule_pairs(rules):
        _schemes_of(value, target)


def _schemes_of(value: Wanted, target: Target) -> tuple[Scheme, ...]:
    return parse_schemes([value] if isinstance(value, str | Scheme) else value, target)


def require_kinds(layers: Mapping[str, Layer], allowed: Mapping[str, Sequence[Scheme]], target: Target) -> None:
    """Raise InvalidRequest for a layer that may get activations quantized token by token and is of a kind that the
    target does not run so.
    """
    for name, schemes in allowed.items():
        found = next((s for s in schemes if s.activation is not None and s.activation.dynamic), None)
        if found is not None and layers[name].kind not in target.dynamic_layers:
            static = found.with_activation(ActivationFormat(found.activation.fmt)) if found.activation else found
            raise InvalidRequest(
                f"{name!r} is a {layers[name].kind} layer, and {found} quantizes inputs token by token, which "
                f"{target.name} does for {', '.join(target.dynamic_layers) or 'no'} layers. Keep it float, by "
                f"rules={{{name!r}: 'float'}}, or use static activations everywhere, such as {static}."
            )


def why_float(layer: Layer, scheme: Scheme, target: Target) -> str:
    """Why a layer cannot take a scheme that the target runs elsewhere; empty where it can."""
    act = layer.carried_out(scheme).activation
    if layer.reason:
        return layer.reason
    if act is not None and act.dynamic and layer.kind not in target.dynamic_layers:
        return f"target {target.name} does not quantize what {layer.kind} layers read token by token ({scheme})"
    inputs = math.prod(layer.shape[1:])
    if scheme.weight is not None and scheme.weight.group and inputs % scheme.weight.group:
        return f"groups of {scheme.weight.group} ({scheme}) do not divide the {inputs} inputs of its output channels"
    return ""


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """The names that a rule's pattern matches. The name of a layer is itself alone, whatever characters are in it."""
    return [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]


def decided_by_rule(name: str, rules: Rules | None, names: Collection[str]) -> bool:
    """Whether some rule's pattern matches a layer, of all with these ``names``."""
    return any(name in matching(pattern, names) for pattern, _ in rule_pairs(rules))


def rule_pairs(rules: Rules | None) -> list[tuple[str, Wanted]]:
    """Rules as (pattern, scheme or schemes); raises InvalidRequest for what is none."""
    if rules is None:
        return []
    if isinstance(rules, str) or not isinstance(rules, Mapping | Sequence):
        raise InvalidRequest(f"rules are pairs (pattern, scheme or schemes) or a table of them, not {rules!r}.")
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for rule in pairs:
        readable = isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)
        if not readable or not isinstance(rule[1], str | Scheme | Sequence):
            raise InvalidRequest(f"A rule is a pair (pattern, scheme or schemes), not {rule!r}.")
    return [(pattern, wanted) for pattern, wanted in pairs]
