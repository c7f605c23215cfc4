"""Evaluation of knowledge edits: did the model learn the new fact, and nothing else?

See docs/EDITING_EVALUATION.md.
"""

from hf_ext.metrics.editing.callback import EditingCallback
from hf_ext.metrics.editing.compare import Comparison, compare
from hf_ext.metrics.editing.evaluator import KnowledgeEditingEvaluator, Predictions
from hf_ext.metrics.editing.records import EditRecord, Question, load_edits
from hf_ext.metrics.editing.report import EditingReport
from hf_ext.metrics.editing.settings import run_editing

__all__ = [
    "Comparison",
    "EditRecord",
    "EditingCallback",
    "EditingReport",
    "KnowledgeEditingEvaluator",
    "Predictions",
    "Question",
    "compare",
    "load_edits",
    "run_editing",
]
