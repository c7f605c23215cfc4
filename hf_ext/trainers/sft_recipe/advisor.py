"""Advice on a sweep while it runs: which of a user's own runs looks worse early, and how often that was right.

"Unveiling the Secret Recipe" (https://huggingface.co/papers/2412.13337) found that on the same data, configurations which end
better show a lower gradient norm and a higher loss early. That is a statement about full fine-tuning of four pretrained models,
and need not hold for others. So nothing is stopped here: each run is ranked among its like by both numbers, and the advice
says in how many pairs of finished runs the same order was right.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_ext.trainers.runs import dataset_digest

logger = logging.get_logger(__name__)

# Sign with which each number is small in runs that end well, as the study found.
INDICATORS = {"grad_norm": 1.0, "loss": -1.0}
# With fewer no order is beyond chance.
_ENOUGH = 4


class SweepAdvisor(TrainerCallback, ExportableState):
    """Notes the first steps and the end of a run in a ledger that all runs of a sweep share, and ranks it among its like.

    Its like are runs of the same model, data, batch size and kind of tuning; gradient norms cannot be compared across these.
    Several processes may write to the ledger at the same time. A run that goes on from a checkpoint keeps its window with
    `restore_callback_states_from_checkpoint=True`.

    Args:
        ledger: a JSON-lines file, made if there is none.
        run: name of this run, unique in the ledger; a run of the same name is replaced.
        window: logged steps that count as early, >= 1. Set `logging_steps=1` for a clear view.
        metric: what is read at the end, of the last evaluation; smaller is better unless `greater_is_better`.
        greater_is_better: for metrics such as accuracy.

    Attributes:
        advice: what was said when the window was full, or None.
    """

    def __init__(
        self,
        ledger: str | os.PathLike[str],
        run: str,
        *,
        window: int = 20,
        metric: str = "eval_loss",
        greater_is_better: bool = False,
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}: give at least 1 logged step.")
        self.ledger, self.run, self.window = Path(ledger), run, window
        self.metric, self.greater_is_better = metric, greater_is_better
        self.advice: str | None = None
        self._seen: dict[str, list[float]] = {name: [] for name in INDICATORS}
        self._like: dict[str, Any] = {}

    # -- the run -----------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.logging_steps > self.window:
            raise ValueError(f"logging_steps={args.logging_steps} is above window={self.window}: set logging_steps=1.")
        self._like = likeness(args, kwargs["model"], kwargs["train_dataloader"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        seen = {name: _number((logs or {}).get(name)) for name in INDICATORS}
        if seen["loss"] is None or len(self._seen["loss"]) >= self.window:
            return
        for name, value in seen.items():
            if value is not None:
                self._seen[name].append(value)
        if len(self._seen["loss"]) == self.window and state.is_world_process_zero:
            self._note({"like": self._like, "early": self._early()})
            self.advice = self._advise()
            logger.warning(self.advice)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        value = _number((metrics or {}).get(self.metric))
        if value is not None and state.is_world_process_zero:
            self._note({"final": value, "metric": self.metric, "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._note({"finished": True})

    def _early(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._seen.items() if values}

    # -- what a checkpoint keeps -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        arguments = {"ledger": str(self.ledger), "run": self.run, "window": self.window, "metric": self.metric}
        return {
            "args": arguments | {"greater_is_better": self.greater_is_better},
            "attributes": {"_seen": self._seen, "advice": self.advice},
        }

    # -- the ledger --------------------------------------------------------------------------------------------------

    def _note(self, facts: dict[str, Any]) -> None:
        """Append a line; one write call, so that lines of several processes do not mix."""
        self.ledger.parent.mkdir(parents=True, exist_ok=True)
        with self.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.run, **facts}) + "\n")

    def _advise(self) -> str:
        runs = read_ledger(self.ledger)
        own = runs[self.run]
        like = {name: run for name, run in runs.items() if run.get("like") == own["like"] and "early" in run}
        lines = [
            f"Run {self.run!r} after {self.window} logged steps, among {len(like)} of the same model, data and batch:"
        ]
        for name, sign in INDICATORS.items():
            values = {other: sign * run["early"][name] for other, run in like.items() if name in run["early"]}
            if self.run not in values:
                continue
            place = 1 + sum(value < values[self.run] for value in values.values())
            height = "low" if sign > 0 else "high"
            lines.append(
                f"- early {name} {own['early'][name]:.4g}: place {place} of {len(values)} ({height} is better in the study); "
                + self._reliability(name, like)
            )
        return "\n".join(lines)

    def _reliability(self, name: str, like: dict[str, dict[str, Any]]) -> str:
        """How often the order by an indicator agreed with the end of finished runs."""
        sign = -1.0 if self.greater_is_better else 1.0
        finished = [
            (INDICATORS[name] * run["early"][name], sign * run["final"])
            for run in like.values()
            if run.get("finished") and run.get("metric") == self.metric and name in run["early"]
        ]
        if len(finished) < _ENOUGH:
            return f"{len(finished)} finished runs are too few to say whether that means anything here."
        pairs = [(a, b) for a, b in itertools.combinations(finished, 2) if a[0] != b[0] and a[1] != b[1]]
        right = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in pairs)
        if not pairs:
            return "all finished runs are equal."
        # Twice the deviation of Kendall's S if the two orders had nothing to do with each other.
        count = len(finished)
        chance = 2 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
        verdict = (
            "so it tells little here"
            if abs(2 * right - len(pairs)) < chance
            else ("so far it holds here" if 2 * right > len(pairs) else "so here it is the other way round")
        )
        return f"in {right} of {len(pairs)} pairs of finished runs this order agreed with {self.metric}, {verdict}."


def read_ledger(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Run name -> what is known of it; later lines complete and replace earlier ones.

    Raises:
        ValueError: a line that is no record of a run; the message has its number.
    """
    runs: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            facts = json.loads(line)
            name = facts.pop("run")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no record of a run: remove it, or use another ledger."
            ) from error
        # A run that starts again under its name begins anew.
        runs[name] = facts if "early" in facts else {**runs.get(name, {}), **facts}
    return runs


def likeness(args: TrainingArguments, model: Any, loader: DataLoader) -> dict[str, Any]:
    """What runs must share for their gradient norms to be comparable."""
    data = loader.dataset if isinstance(loader.dataset, Dataset) else None
    return {
        "model": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "data": None if data is None else dataset_digest(data),
        "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }


def _number(value: Any) -> float | None:
    """A finite number, also from text, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
