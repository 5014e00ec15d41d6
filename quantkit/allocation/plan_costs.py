"""What each limit of a budget counts of a decided plan, in the integers of ``Budget.limits``."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.allocation.from_profile import COSTS
from quantkit.errors import InvalidRequest
from quantkit.formats import Scheme
from quantkit.plan import Plan, Profile
from quantkit.plan.latency import FULL_BITS
from quantkit.plan.operations import Execution, execute, peak_bytes

# What depends on which layers run on codes, and not only on the sum of the layers' formats.
OF_EXECUTION = ("latency", "activation_bytes")
COUNTED = (*COSTS, *OF_EXECUTION)
FLOAT_BYTES = 4


def execution_of(profile: Profile, schemes: Mapping[str, Scheme]) -> Execution:
    """What runs on codes under a plan."""
    quantized = {name: scheme.weight for name, scheme in schemes.items() if scheme.has_codes}
    wide = [name for name, weight in quantized.items() if weight is not None and weight.bits >= FULL_BITS]
    return execute(profile.operations, quantized, wide)


def counted(profile: Profile, schemes: Mapping[str, Scheme], sites: Mapping[str, str], name: str) -> int:
    """The amount of a limit that a plan uses. Raises InvalidRequest where the profile has no costs for it."""
    if name == "latency":
        return latency_of(profile, schemes)
    if name == "activation_bytes":
        return activation_bytes(profile, schemes, sites)
    used = sum(COSTS[name](layer, schemes[layer.name]) for layer in profile.layers.values())
    return used + (profile.other_bytes if name == "size" else 0)


def latency_of(profile: Profile, schemes: Mapping[str, Scheme]) -> int:
    """Predicted nanoseconds of a batch."""
    if profile.latency is None:
        raise InvalidRequest("The profile has no latency table; `quantkit bench RECIPE` measures one.")
    return profile.latency.predict(execution_of(profile, schemes))


def activation_bytes(profile: Profile, schemes: Mapping[str, Scheme], sites: Mapping[str, str]) -> int:
    """The most bytes of sites alive at once, of one sample: codes in whole bytes, everything else in float32."""
    coded = execution_of(profile, schemes).coded
    sizes = {
        name: site_bytes(site.elements, sites.get(name, "float") if name in coded else "float")
        for name, site in profile.sites.items()
    }
    return peak_bytes(profile.operations, sizes)


def site_bytes(elements: int, fmt: str) -> int:
    """Bytes of a site's tensor in a format; codes take whole bytes, whatever their width."""
    activation = Scheme.parse(fmt).activation
    return elements * (FLOAT_BYTES if activation is None else -(-activation.bits // 8))


def costs_of_execution(plan: Plan, profile: Profile, limits: Mapping[str, int]) -> dict[str, float]:
    """What a plan is predicted to use of the limits that depend on what runs on codes, for its provenance."""
    costs: dict[str, float] = {}
    if "latency" in limits and profile.latency is not None:
        costs["latency_ns"] = latency_of(profile, plan.schemes)
        costs["latency_ratio"] = costs["latency_ns"] / profile.latency.float_ns
    if "activation_bytes" in limits:
        costs["activation_bytes"] = activation_bytes(profile, plan.schemes, plan.sites)
    return costs
