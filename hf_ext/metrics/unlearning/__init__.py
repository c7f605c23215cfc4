"""Evaluation of unlearning: is it forgotten, is the rest intact, and does it come back?

See docs/UNLEARNING_EVALUATION.md.
"""

from hf_ext.metrics.unlearning.attacks import quantized_copy, without_adapter
from hf_ext.metrics.unlearning.callback import UnlearningEvalCallback
from hf_ext.metrics.unlearning.evaluate import evaluate_unlearning
from hf_ext.metrics.unlearning.measures import ForgetQuality, forget_quality, model_utility, privleak
from hf_ext.metrics.unlearning.options import ATTACKS
from hf_ext.metrics.unlearning.relearning import RelearningCurve, relearning_curve
from hf_ext.metrics.unlearning.report import UnlearningReport
from hf_ext.metrics.unlearning.scores import AnswerScores, PromptFormat, TokenScores, answer_scores
from hf_ext.metrics.unlearning.tofu import load_tofu

__all__ = [
    "ATTACKS",
    "AnswerScores",
    "ForgetQuality",
    "PromptFormat",
    "RelearningCurve",
    "TokenScores",
    "UnlearningEvalCallback",
    "UnlearningReport",
    "answer_scores",
    "evaluate_unlearning",
    "forget_quality",
    "load_tofu",
    "model_utility",
    "privleak",
    "quantized_copy",
    "relearning_curve",
    "without_adapter",
]
