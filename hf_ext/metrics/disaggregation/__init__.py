"""Results broken down by group, with honest uncertainty.

See docs/RESULTS_BY_GROUP.md.
"""

from hf_ext.metrics.disaggregation.evaluate import disaggregate
from hf_ext.metrics.disaggregation.report import GroupReport, GroupResult

__all__ = ["GroupReport", "GroupResult", "disaggregate"]
