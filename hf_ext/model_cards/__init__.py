"""Honest model cards and one-commit publishing.

build_card      a complete card from what a model or a trainer knows about itself
validate        what the Hub would reject and what a reader would miss, offline
publish, save   model and card together, to the Hub in one commit or to a folder in one rename
check_adapter   is this adapter intact, and made for that base model?
"""

from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.check import check_adapter
from hf_ext.model_cards.publish import PublishError, publish
from hf_ext.model_cards.saving import save
from hf_ext.model_cards.validate import Report, validate

__all__ = ["PublishError", "Report", "build_card", "check_adapter", "publish", "save", "validate"]
