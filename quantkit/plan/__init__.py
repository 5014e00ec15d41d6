"""The records that travel between the stages: what was measured (Profile) and what was decided (Plan).

Plain data with exact save and load; nothing here needs torch.
"""

from quantkit.plan.composition import LEFT as LEFT
from quantkit.plan.composition import Composition as Composition
from quantkit.plan.composition import SizePart as SizePart
from quantkit.plan.digest import canonical_json as canonical_json
from quantkit.plan.digest import digest_of as digest_of
from quantkit.plan.plan import COMPOSITION as COMPOSITION
from quantkit.plan.plan import FLOAT_STORAGE as FLOAT_STORAGE
from quantkit.plan.plan import LARGEST_OTHERS as LARGEST_OTHERS
from quantkit.plan.plan import TRANSFORMS as TRANSFORMS
from quantkit.plan.plan import Plan as Plan
from quantkit.plan.profile import Profile as Profile
from quantkit.plan.profile import saturated as saturated
from quantkit.plan.records import FLOAT as FLOAT
from quantkit.plan.records import Layer as Layer
from quantkit.plan.records import SiteRecord as SiteRecord
from quantkit.plan.records import average_bits as average_bits
from quantkit.plan.records import digest_shapes as digest_shapes
