"""Search: the best shape within a budget, and the Pareto front.

A model has some hundreds to thousands of distinct shapes and judging one takes microseconds, so all of them are tried
(``choice``). Where every latency must first be measured, ``hierarchical`` asks for few. ``together`` finds the one
shape that suits several devices.
"""

from __future__ import annotations

from amoeba_deploy.profiles.prediction import Metric
from amoeba_deploy.search.budget import Budget, Limit
from amoeba_deploy.search.candidate import (
    Candidate,
    SubnetSizes,
    candidates,
    prediction_to_json,
    quality_to_json,
)
from amoeba_deploy.search.choice import SearchResult, pareto_front, search
from amoeba_deploy.search.quantity import QUANTITIES

__all__ = [
    "QUANTITIES",
    "Budget",
    "Candidate",
    "Limit",
    "Metric",
    "SearchResult",
    "SubnetSizes",
    "candidates",
    "pareto_front",
    "prediction_to_json",
    "quality_to_json",
    "search",
]
