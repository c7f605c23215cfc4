"""Honest model cards and one-commit publishing.

build_card      a complete card from what a model or a trainer knows about itself
validate        what the Hub would reject and what a reader would miss, offline
score           which of the nine sections of a model card are there, and which of them state something
publish, save   model and card together, to the Hub in one commit or to a folder in one rename
verify          is what was published what the card says?
check_adapter   is this adapter intact, and made for that base model?
Cost, CostCallback, estimated_cost   what training cost
"""

from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.check import check_adapter
from hf_ext.model_cards.facts.cost import Cost, CostCallback, estimated_cost
from hf_ext.model_cards.publish import PublishError, publish
from hf_ext.model_cards.rules.sections import score
from hf_ext.model_cards.running import SnippetError
from hf_ext.model_cards.saving import save
from hf_ext.model_cards.validate import Report, validate
from hf_ext.model_cards.verify import Verification, verify

__all__ = [
    "Cost",
    "CostCallback",
    "PublishError",
    "Report",
    "SnippetError",
    "Verification",
    "build_card",
    "check_adapter",
    "estimated_cost",
    "publish",
    "save",
    "score",
    "validate",
    "verify",
]
