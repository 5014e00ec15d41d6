"""The records that travel between the stages: what was measured (Profile) and what was decided (Plan).

Plain data with exact save and load; nothing here needs torch.
"""

from quantkit.plan.digest import canonical_json, digest_of
from quantkit.plan.plan import Plan
from quantkit.plan.profile import Profile, saturated
from quantkit.plan.records import Layer, SiteRecord, average_bits, digest_shapes

__all__ = [
    "Layer",
    "Plan",
    "Profile",
    "SiteRecord",
    "average_bits",
    "canonical_json",
    "digest_of",
    "digest_shapes",
    "saturated",
]
