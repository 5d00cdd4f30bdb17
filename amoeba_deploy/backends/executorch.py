"""The ``executorch`` flow."""

from __future__ import annotations

from amoeba_deploy.backends.planned import Planned
from amoeba_deploy.backends.takes import Takes

BACKEND = Planned(Takes("executorch", ("fp32", "int8", "int4"), any_trait=True))
