"""What keeps a model above a limit in its smallest form: layers that stay float, what is no layer, and layers that
rules or ``first_last`` hold wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantkit.allocation.from_profile import candidates
from quantkit.formats import Scheme
from quantkit.plan import LARGEST_OTHERS, Composition, Profile, SizePart

SHOWN = 4


def narrowest(profile: Profile, schemes: Iterable[str | Scheme] | None = None) -> dict[str, Scheme]:
    """The candidate of every layer that takes fewest bytes."""
    return {
        name: min(options, key=profile.layers[name].weight_bytes)
        for name, options in candidates(profile, schemes).items()
    }


def what_holds(limit: str, most: int, profile: Profile, schemes: Iterable[str | Scheme] | None) -> str:
    """What may be asked for beside the smallest where a ``limit``, of ``most`` bytes, cannot be met, and what that
    consists of, the largest first. What is counted otherwise than in bytes has no such parts.
    """
    if limit not in ("size", "average_bits"):
        return ", or profile narrower schemes."
    least = narrowest(profile, schemes)
    made = Composition.of(profile.layers, least, profile.other_bytes, profile.float_bytes)
    held = _held_wide(profile, least)
    others = profile.provenance.get(LARGEST_OTHERS, {}) if limit == "size" else {}
    parts = [*made.floats, *held, *(SizePart("no layer's weight", (name,), size) for name, size in others.items())]
    parts.sort(key=lambda one: -one.bytes)
    fixed = made.float_bytes + (profile.other_bytes if limit == "size" else 0)
    if fixed > most:
        way = f": narrower schemes do not help, as {fixed:,} bytes hold no codes."
    elif held:
        way = ", or for narrower schemes of layers that rules or first_last hold wide."
    else:
        way = ", or profile narrower schemes."
    total = f" At the least: {made}." if limit == "size" else ""
    return way + total + (f" The largest: {'; '.join(map(str, parts[:SHOWN]))}." if parts else "")


def _held_wide(profile: Profile, least: Mapping[str, Scheme]) -> list[SizePart]:
    """The layers whose narrowest candidate is wider than what others may have, by that, and by who decided so."""
    known = profile.provenance.get("first_last", {})
    by_policy = {name for end in ("first", "last") for name in known.get(end, ())} - set(known.get("by_rule", ()))
    offered = [scheme.weight for name in profile.schemes if (scheme := Scheme.parse(name)).weight is not None]
    found: dict[str, list[str]] = {}
    for name, scheme in least.items():
        layer = profile.layers[name]
        if any(fmt.storage_bytes(layer.shape) < layer.weight_bytes(scheme) for fmt in offered if fmt is not None):
            policy = name in by_policy and known.get("policy", "same") != "same"
            who = f"first_last={known['policy']!r}" if policy else "rules"
            found.setdefault(f"{scheme} by {who}", []).append(name)
    return [_together(profile, least, reason, names) for reason, names in found.items()]


def _together(profile: Profile, least: Mapping[str, Scheme], reason: str, names: list[str]) -> SizePart:
    sizes = {name: profile.layers[name].weight_bytes(least[name]) for name in names}
    ordered = sorted(names, key=lambda name: -sizes[name])
    return SizePart(reason, tuple(ordered), sum(sizes.values()))
