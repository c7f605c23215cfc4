"""Arguments of the unlearning trainers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, cast

from trl import DPOConfig

from hf_ext.trainers.flat.divergences import get_divergence
from hf_ext.trainers.flat.loss import PROBABILITY_KINDS
from hf_ext.trainers.flat.methods import COEFFICIENTS, METHODS, Method

# Fields of DPOConfig that only DPO's own losses and its running reference model read.
_WITHOUT_EFFECT = (
    "beta",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "label_smoothing_factor",
    "use_weighting",
    "discopop_tau",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "precompute_ref_log_probs",
)
_FLAT_ONLY = ("divergence", "template_probability", "forget_probability", "padded_length", "template_coef")
_TEMPLATES_ONLY = ("template_answers", "templates_per_example")


@dataclass
class UnlearnConfig(DPOConfig):
    r"""
    Arguments of [`UnlearnTrainer`]: those of [`~trl.DPOConfig`] and the following. The fields of `DPOConfig` that
    belong to its own losses (`beta`, `loss_weights`, `label_smoothing`, ...) are rejected unless they keep their
    default; `max_length` keeps its meaning, and `precompute_ref_batch_size` has one for npo and
    idk_dpo.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `1e-5`):
            Learning rate, > 0; the default is that of the FLAT and TOFU runs with full fine-tuning of 7B models. LoRA
            usually needs ten times as much.
        loss_type (`str`, *optional*, defaults to `"flat"`):
            The method: `"flat"` (https://huggingface.co/papers/2410.11143), `"gradient_ascent"`,
            `"gradient_difference"`, `"npo"`, `"simnpo"`, `"idk_dpo"`, `"wga"`, `"satimp"`, `"undial"`, `"ceu"` or
            `"rmu"`; the papers are listed in `baselines.py`.
        loss_kwargs (`dict` or `str`, *optional*):
            Numbers of the chosen method, as JSON on the command line. npo and idk_dpo: `beta` (0.1); simnpo: `beta`
            (4.5), `delta` (0.0); wga: `beta` (1.0); satimp: `beta1` (5.0), `beta2` (1.0); undial: `beta` (10.0); ceu:
            `ignore_first` (1) answer tokens; rmu: `layer` (7) and `coefficient` (2.0), the norm of the vector that its
            activations are steered to. Betas of npo, simnpo and idk_dpo and the coefficient are > 0, all others >= 0.
            The defaults are those of the papers or of their published code.
        divergence (`str`, *optional*, defaults to `"kl"`):
            FLAT's f-divergence: `"kl"`, `"js"`, `"tv"`, `"pearson"` (the paper's four), `"jeffrey"`, `"reverse_kl"`,
            `"squared_hellinger"` or `"neyman"`.
        template_probability (`str`, *optional*, defaults to `"mean"`):
            Probability of the refusal in FLAT: `"mean"` over its tokens, as in the paper, or `"geometric"`, which also
            teaches a refusal that the model finds improbable. Not in the paper.
        forget_probability (`str`, *optional*, defaults to `"mean"`):
            The same choice for the answer to forget. Keep `"mean"`: with `"geometric"` the answer is hidden behind its
            first token and comes back quickly.
        padded_length (`int`, *optional*):
            Reproduce the authors' code: one probability per batch, the sum over all answers divided by batch size
            times this length: that of the padded sequences less one, so >= `max_length - 1`, with `max_length` rounded up
            to `pad_to_multiple_of`. The loss then depends on what else is in the micro-batch. `None` is the paper's
            definition.
        template_answers (`list[str]` or `str`, *optional*):
            Refusals for prompt-completion data, for flat and idk_dpo: a list, or a path to a `.txt` file with one per
            line or a `.jsonl` file with one `answer` per line. `None` uses a built-in list of 20 sentences.
        templates_per_example (`int`, *optional*, defaults to `1`):
            Refusals tokenised for each prompt, >= 1; every epoch uses one of them, drawn by (seed, epoch, row).
        template_coef (`float`, *optional*, defaults to `1.0`):
            Weight of FLAT's template term, >= 0.
        forget_coef (`float`, *optional*):
            Weight of the forget term, >= 0. `None` is the method's default: 0.125 for simnpo, 0.1 for satimp, else 1.
        retain_coef (`float`, *optional*):
            Weight of the retain term, >= 0. `None` is the method's default if there is a retain dataset: 1, but none
            for gradient_ascent, undial and ceu. FLAT's paper has no retain term.
        retain_loss (`str`, *optional*, defaults to `"nll"`):
            `"nll"`, the cross-entropy of the retain answers, or `"kl"` from the model before unlearning. rmu compares
            activations instead.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + ["loss_kwargs"]  # noqa: RUF005

    learning_rate: float = field(
        default=1e-5,
        metadata={"help": "Learning rate, > 0. LoRA usually needs ten times the default."},
    )
    loss_type: str = field(  # type: ignore[assignment]
        default="flat",
        metadata={"help": "The method.", "choices": list(METHODS)},
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Numbers of the chosen method, e.g. '{\"beta\": 0.1}' for npo."},
    )
    divergence: str = field(
        default="kl",
        metadata={"help": "FLAT's f-divergence: kl, js, tv, pearson, jeffrey, reverse_kl, squared_hellinger, neyman."},
    )
    template_probability: str = field(
        default="mean",
        metadata={"help": "Probability of the refusal in FLAT: mean over its tokens, or geometric."},
    )
    forget_probability: str = field(
        default="mean",
        metadata={"help": "Probability of the answer to forget in FLAT: mean over its tokens, or geometric."},
    )
    padded_length: int | None = field(
        default=None,
        metadata={"help": "Reproduce the authors' code: the length that sequences are padded to, less one."},
    )
    template_answers: list[str] | str | None = field(
        default=None,
        metadata={"help": "Refusals: a list, or a .txt or .jsonl file. None uses a built-in list."},
    )
    templates_per_example: int = field(
        default=1,
        metadata={"help": "Refusals tokenised for each prompt; every epoch uses one of them."},
    )
    template_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of FLAT's template term, >= 0."},
    )
    forget_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of the forget term, >= 0. None: the method's default."},
    )
    retain_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of the retain term, >= 0. None: the method's default with a retain dataset."},
    )
    retain_loss: str = field(
        default="nll",
        metadata={"help": "Retain term: nll, or kl from the model before unlearning.", "choices": ["nll", "kl"]},
    )

    def __post_init__(self) -> None:
        loss_type = self.loss_type
        if not isinstance(loss_type, str) or loss_type not in METHODS:
            raise ValueError(f"loss_type={loss_type!r} is unknown: choose one of {', '.join(METHODS)}.")
        super().__post_init__()
        # DPOConfig makes a list of it, because DPO mixes losses.
        self.loss_type = loss_type
        self._check_inherited()
        self._check_own()
        self.forget_arguments()

    @property
    def method(self) -> Method:
        """The row of `METHODS` that `loss_type` names."""
        return METHODS[self.loss_type]

    def forget_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the forget term; raises `ValueError` for an unknown name or a value out of range."""
        method, given = self.method, cast("dict[str, Any]", self.loss_kwargs or {})
        if self.loss_type == "flat":
            if given:
                raise ValueError(
                    f"loss_kwargs={given!r} has no effect on flat, which has fields of its own: "
                    f"{', '.join(_FLAT_ONLY)}."
                )
            return {name: getattr(self, name) for name in _FLAT_ONLY} | {"forget_coef": self.weights(False)[0]}
        unknown = [name for name in given if name not in method.kwargs]
        if unknown:
            known = ", ".join(method.kwargs) or "none"
            raise ValueError(
                f"loss_kwargs has the unknown name(s) {', '.join(unknown)} for {self.loss_type}, which takes: {known}."
            )
        arguments = {**method.kwargs, **given}
        for name, value in arguments.items():
            whole = isinstance(method.kwargs[name], int)
            kind: Any = int if whole else (int, float)
            wrong = not isinstance(value, kind) or isinstance(value, bool) or not value >= 0
            if wrong or (name in method.positive and value == 0):
                bound = "> 0" if name in method.positive else ">= 0"
                raise ValueError(
                    f"loss_kwargs[{name!r}]={value!r}: {self.loss_type} needs {'an integer' if whole else 'a number'} "
                    f"{bound}."
                )
        return arguments

    def weights(self, with_retain: bool) -> tuple[float, float]:
        """(weight of the forget term, weight of the retain term), the latter 0 without a retain dataset."""
        forget, retain = COEFFICIENTS[self.loss_type]
        return (
            forget if self.forget_coef is None else self.forget_coef,
            (retain if self.retain_coef is None else self.retain_coef) if with_retain else 0.0,
        )

    def check_retain(self, with_retain: bool) -> None:
        """Raises `ValueError` if the fields contradict the presence or absence of a retain dataset."""
        if with_retain:
            if self.weights(True)[1] == 0:
                raise ValueError(
                    f"retain_dataset has no effect: {self.loss_type} has no retain term with "
                    f"retain_coef={self.retain_coef}. Set retain_coef, or leave the dataset out."
                )
            return
        if self.loss_type == "gradient_difference":
            raise ValueError(
                "loss_type='gradient_difference' is gradient ascent with a retain term: give a retain_dataset, or "
                "choose gradient_ascent."
            )
        for name, needed in (("retain_coef", bool(self.retain_coef)), ("retain_loss", self.retain_loss != "nll")):
            if needed:
                raise ValueError(f"{name}={getattr(self, name)!r} needs a retain_dataset: give one, or leave it out.")

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        defaults = {item.name: item.default for item in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _check_inherited(self) -> None:
        for name in self._changed(_WITHOUT_EFFECT):
            if self.loss_type == "flat":
                why = "FLAT, which is reference-free: leave it at its default"
            else:
                why = f"{self.loss_type}: use loss_kwargs for the numbers of the method"
            raise ValueError(f"{name}={getattr(self, name)!r} has no effect on {why}.")
        if self.method.reference != "sums" and self._changed(("precompute_ref_batch_size",)):
            raise ValueError(
                f"precompute_ref_batch_size={self.precompute_ref_batch_size} has no effect on {self.loss_type}, which "
                "computes no reference before the training: leave it out."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}: give a number > 0.")
        if self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} sorts by the length of one sequence per "
                "row, and the rows here hold several: choose random or sequential."
            )

    def _check_own(self) -> None:
        if self.loss_type != "flat":
            for name in self._changed(_FLAT_ONLY):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to flat and has no effect on {self.loss_type}: leave it out."
                )
        if not self.method.template:
            for name in self._changed(_TEMPLATES_ONLY):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect on {self.loss_type}, which uses no refusals: leave it out."
                )
        get_divergence(self.divergence)
        for name in ("template_probability", "forget_probability"):
            if getattr(self, name) not in PROBABILITY_KINDS:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(PROBABILITY_KINDS)}."
                )
        for name in ("template_coef", "forget_coef", "retain_coef"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} turns its term round: give a weight >= 0.")
        if self.templates_per_example < 1:
            raise ValueError(f"templates_per_example={self.templates_per_example}: give a number >= 1.")
        if self.template_answers is not None and not self.template_answers:
            raise ValueError("template_answers is empty: give at least one refusal, or None for the built-in list.")
        if self.retain_loss not in ("nll", "kl"):
            raise ValueError(f"retain_loss={self.retain_loss!r} is unknown: choose one of nll, kl.")
        if self.loss_type == "rmu" and self.retain_loss != "nll":
            raise ValueError(
                f"retain_loss={self.retain_loss!r} has no effect on rmu, whose retain term compares activations: leave it out."
            )
        if self.padded_length is not None:
            self._check_padded_length(self.padded_length)

    def _check_padded_length(self, length: int) -> None:
        if "geometric" in (self.template_probability, self.forget_probability):
            raise ValueError(
                f"padded_length={length} reproduces a mean over the batch and excludes the geometric probability: "
                "leave one of the two out."
            )
        multiple = cast("int | None", self.pad_to_multiple_of) or 1
        if self.max_length is None or length < -(-self.max_length // multiple) * multiple - 1:
            padding = "" if multiple == 1 else f" padded to a multiple of {multiple} and"
            raise ValueError(
                f"padded_length={length} is shorter than max_length={self.max_length}{padding} less one: sequences "
                "could exceed it, so raise it or lower max_length."
            )


@dataclass
class FlatConfig(UnlearnConfig):
    r"""
    Arguments of [`FlatTrainer`]: those of [`UnlearnConfig`] with `loss_type="flat"`
    (https://huggingface.co/papers/2410.11143). Reproducing the paper's runs: `learning_rate` 1e-5 for full fine-tuning
    of Llama-2-7B, 5 epochs, an effective batch of 64, `weight_decay` 0.01 and a warm-up of one epoch.
    """

    def __post_init__(self) -> None:
        if self.loss_type != "flat":
            raise ValueError(
                f"loss_type={self.loss_type!r}: FlatConfig is FLAT; use UnlearnConfig and UnlearnTrainer for the "
                "others."
            )
        super().__post_init__()
