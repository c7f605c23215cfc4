"""One model, one task after another: `TaskSequenceTrainer`, a `trl.SFTTrainer` for a sequence of datasets.

It trains the tasks in order, reads the scores on all of them after each, and writes everything below `output_dir`:

    _continual_state.json          tasks, how many are learnt, the task matrix; written last, under a temporary name
    README.md                      our card with the task matrix
    _task_00_first/checkpoint-8/   checkpoints of one task, with optimizer and random state
    _task_00_first/                the model after the task

so that no task overwrites another's checkpoints, and a run that was killed goes on where it was. `Trainer` pushes nothing whose
name starts with an underscore, so that the Hub gets the model and the card alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, IntervalStrategy, SaveStrategy, set_seed
from trl import SFTConfig, SFTTrainer

from hf_ext._modes import evaluating
from hf_ext.metrics.continual import ContinualReport, TaskMatrix
from hf_ext.trainers.cards import CardMixin
from hf_ext.trainers.output_layer import AnswersOnly, base_of, patching, score_answers
from hf_ext.trainers.runs import dataset_digest
from hf_ext.trainers.shared_prefix import can_share_prefix, score_groups
from hf_ext.trainers.tasks import ContinualTask, read_tasks

STATE_FILE = "_continual_state.json"


class TaskSequenceTrainer(CardMixin, SFTTrainer):
    """Fine-tune a model on one task after another; what subclasses do against forgetting goes into their hooks.

    `train()` runs all tasks, each with a fresh optimizer and scheduler and its own random seed (`args.seed` + its number), and
    `matrix` holds the scores: `matrix.metrics()`, `matrix.table()` and `matrix.plot(path)`.

    Args:
        model: as for `SFTTrainer`.
        args: an `SFTConfig`; steps and epochs are those of each task. With `save_strategy="no"` nothing is written, and
            an interrupted run starts again.
        tasks: `ContinualTask`s, or a mapping of names to training datasets.
        kwargs: as for `SFTTrainer`.

    Raises:
        ValueError: no tasks, or an option that has no meaning for a sequence of them.
    """

    args: SFTConfig
    model: Any
    processing_class: Any

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | None = None,
        tasks: Iterable[ContinualTask] | Mapping[str, Any] = (),
        **kwargs: Any,
    ) -> None:
        for name in ("train_dataset", "eval_dataset"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} has no place in a sequence of tasks: give tasks=[ContinualTask(...), ...].")
        if args is not None:
            _check(args)
        self.tasks = read_tasks(tasks)
        self.task_number = 0
        with patching(self, model):
            super().__init__(model=model, args=args, train_dataset=self.tasks[0].train, **kwargs)
        self._prepared = {0: self.train_dataset}
        self._scored: dict[int, tuple[Dataset, torch.Tensor | None]] = {}
        self._rows: list[tuple[float | None, ...]] = []
        self._before: tuple[float | None, ...] | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(AnswersOnly(model, base_of(self.model)), inputs, *args, **kwargs)

    # -- hooks for subclasses ----------------------------------------------------------------------------------------

    def before_task(self, number: int, resumed: bool) -> None:
        """Called with the weights as the task starts; those of a resumed one are loaded afterwards, and the optimizer made."""

    def release_task(self, number: int) -> None:
        """Called when the training of a task has ended, by an error or an interruption too."""

    def after_task(self, number: int) -> None:
        """Called when a task is learnt, before it is scored and saved."""

    def restore_task(self, number: int) -> None:
        """Called when a run goes on after this task, with the model that was saved after it."""

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Learn all tasks.

        Args:
            resume_from_checkpoint: go on with the run in `output_dir`; False and None start a new one, which must not have one
                there.
            args, kwargs: as for `Trainer.train`.

        Raises:
            ValueError: there is a run already, or none to go on with, or one of other tasks or another seed.
        """
        if resume_from_checkpoint not in (None, True, False):
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: a sequence goes on from its folder, so give True."
            )
        finished = self._resumed() if resume_from_checkpoint else self._started()
        result = None
        for number in range(finished, len(self.tasks)):
            checkpoint = self._last_checkpoint(number) if resume_from_checkpoint else None
            if number == 0 and resume_from_checkpoint and checkpoint is None and self.state.global_step:
                raise ValueError(
                    "the first task was interrupted before its first checkpoint, and this model is half trained: make the "
                    "trainer anew."
                )
            self.task_number = number
            set_seed(self.args.seed + number)
            self.optimizer = self.lr_scheduler = None
            self.train_dataset = self.prepared(number)
            self.before_task(number, resumed=checkpoint is not None)
            try:
                if checkpoint is None or not self._was_last(checkpoint):
                    result = super().train(checkpoint, *args, **kwargs)
            finally:
                self.release_task(number)
            self.after_task(number)
            self._finish(number)
        return result

    def _was_last(self, checkpoint: str) -> bool:
        """Load a checkpoint after which nothing is left to train; `Trainer` would take one step more."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self._load_from_checkpoint(checkpoint)
        self.state = state
        return True

    def prepared(self, number: int) -> Dataset:
        """The training dataset of a task, tokenised."""
        if number not in self._prepared:
            task = self.tasks[number]
            self._prepared[number] = self._tokenised(task.train, f"train ({task.name})")
        return self._prepared[number]

    def _tokenised(self, data: Dataset, name: str, packing: bool | None = None, whole: bool = False) -> Dataset:
        """Tokenised as `SFTTrainer` would; `whole`: not truncated."""
        if self.args.completion_only_loss is None:
            # TRL looks at the first dataset alone.
            self.completion_only_loss = {"prompt", "completion"} <= set(data.column_names)
        packed, args = self.args.packing if packing is None else packing, self.args
        if whole:
            args = copy.copy(args)
            args.max_length = None
        return self._prepare_dataset(data, self.processing_class, args, packed, self._formatting_func, name)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder_of(self.task_number))

    def folder_of(self, number: int) -> Path:
        """Where the checkpoints of a task and the model after it are."""
        return Path(str(self.args.output_dir)) / f"_task_{number:02d}_{self.tasks[number].name}"

    # -- scores ------------------------------------------------------------------------------------------------------

    def scores(self) -> tuple[float | None, ...]:
        """Score of the model as it is on every task, in percent; None for tasks without `eval`."""
        return tuple(None if task.eval is None else self._score(number) for number, task in enumerate(self.tasks))

    def _score(self, number: int) -> float:
        task = self.tasks[number]
        if number not in self._scored:
            self._scored[number] = self._read_choices(task) if task.options else self._read_answers(task)
        data, right = self._scored[number]
        if right is None:
            return 100 * float(self._read(data)[1].mean())
        log_probs = self._read(data, right.shape[1])[0].view_as(right)
        best = log_probs >= log_probs.amax(-1, keepdim=True)
        return 100 * float(((best & right).sum(-1) / best.sum(-1)).double().mean())

    def _read_answers(self, task: ContinualTask) -> tuple[Dataset, None]:
        assert task.eval is not None
        return self._tokenised(task.eval, f"eval ({task.name})", packing=False), None

    def _read_choices(self, task: ContinualTask) -> tuple[Dataset, torch.Tensor]:
        """(every evaluation row with every option, tokenised; which of them are right, `(rows, options)`)."""
        assert task.eval is not None and task.options is not None
        rows = [{**row, "completion": option} for row in task.eval for option in task.options]
        right = torch.tensor([[option == answer for option in task.options] for answer in task.eval["completion"]])
        pairs, name = Dataset.from_list(rows), f"eval ({task.name})"
        data = self._tokenised(pairs, name, packing=False)
        whole = self._tokenised(pairs, name, packing=False, whole=True)
        cut = len(whole) - len(data)
        if not cut:
            cut = sum(_answer_tokens(a) < _answer_tokens(b) for a, b in zip(data, whole, strict=True))
        if cut:
            raise ValueError(
                f"task {task.name!r}: max_length={self.args.max_length} leaves no room for an answer in "
                f"{cut} of {right.numel()} pairs of eval rows and options: raise it."
            )
        return data, right

    @torch.no_grad()
    def _read(self, data: Dataset, group: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probability of the labelled tokens, share of them that are the most probable ones) of each row `(rows,)`.

        The rows are shared between the processes. `group` rows in turn have the same prompt.
        """
        loader = self.accelerator.prepare_data_loader(self.plain_loader(data, group))
        model = self.accelerator.unwrap_model(self.model)
        base = base_of(model)
        shares_prefix = group > 1 and can_share_prefix(model, base)
        sums, shares = [], []
        with evaluating(model), self.accelerator.autocast():
            for batch in loader:
                answer = batch.pop("labels") != -100
                if shares_prefix:
                    outputs, _ = score_groups(model, base, batch["input_ids"], batch["attention_mask"], answer, group)
                else:
                    outputs = score_answers(model, base, {**batch, "use_cache": False}, answer)
                share = outputs.is_top1.sum(-1) / answer[:, 1:].sum(-1)
                sums.append(self.accelerator.gather_for_metrics(outputs.log_probs.sum(-1)))
                shares.append(self.accelerator.gather_for_metrics(share))
        return torch.cat(sums).cpu(), torch.cat(shares).double().cpu()

    def plain_loader(self, data: Dataset, group: int = 1) -> DataLoader:
        """Batches of tokenised rows, one per row of a batch and padded, whatever the collator of the training does.

        A batch has whole groups of `group` rows.
        """
        size = max(self.args.per_device_eval_batch_size // group, 1) * group
        pad = self.processing_class.pad_token_id

        def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            fills = {"input_ids": pad, "labels": -100, "attention_mask": 0}
            rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
            return {
                name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill)
                for name, fill in fills.items()
            }

        return DataLoader(cast(Any, data), size, collate_fn=collate)

    # -- the run on disk ---------------------------------------------------------------------------------------------

    @property
    def _keeps_files(self) -> bool:
        return self.args.save_strategy != SaveStrategy.NO

    def _identity(self) -> dict[str, Any]:
        """What must agree for a run to go on: the tasks, their data, and the seed."""
        data = [
            [dataset_digest(split) for split in (task.train, task.eval) if split is not None] for task in self.tasks
        ]
        options = [task.options and list(task.options) for task in self.tasks]
        names = [task.name for task in self.tasks]
        return {"tasks": names, "data": data, "options": options, "seed": self.args.seed}

    def _started(self) -> int:
        path = Path(str(self.args.output_dir)) / STATE_FILE
        if path.exists():
            raise ValueError(
                f"{path} is of an earlier run: pass resume_from_checkpoint=True to go on with it, or another output_dir."
            )
        self._rows, self._before = [], self.scores()
        self._write_state()
        return 0

    def _resumed(self) -> int:
        """Tasks learnt so far; their scores, and the model after the last of them, are loaded."""
        path = Path(str(self.args.output_dir)) / STATE_FILE
        if not path.exists():
            raise ValueError(
                f"there is no {path}, so there is no run to go on with: leave resume_from_checkpoint out."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"{path} is of another run: its {name} are {state[name]}, and here they are {value}.")
        self._rows, self._before = [tuple(row) for row in state["rows"]], tuple(state["before"])
        if self._rows:
            self._load_from_checkpoint(str(self.folder_of(len(self._rows) - 1)))
            self.restore_task(len(self._rows) - 1)
        return len(self._rows)

    def _last_checkpoint(self, number: int) -> str | None:
        """The last complete one of a task: the state of the trainer is written last."""
        found = [
            path.parent for path in self.folder_of(number).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        ]
        return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None

    def _finish(self, number: int) -> None:
        self._rows.append(self.scores())
        if self._keeps_files:
            self.save_model(str(self.folder_of(number)))
            self.create_model_card(model_name=Path(str(self.args.output_dir)).name)
        self._write_state()

    def _write_state(self) -> None:
        if not self._keeps_files:
            return
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / STATE_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp")
            state = {**self._identity(), "before": self._before, "rows": self._rows}
            scratch.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            scratch.replace(path)
        self.accelerator.wait_for_everyone()

    @property
    def matrix(self) -> TaskMatrix:
        """Scores after every task learnt so far.

        Raises:
            ValueError: no task is learnt.
        """
        if not self._rows:
            raise ValueError("no task is learnt yet: call train().")
        sizes = [0 if task.eval is None else len(task.eval) for task in self.tasks]
        names = tuple(task.name for task in self.tasks)
        return TaskMatrix(names, tuple(self._rows), self._before, sizes=tuple(sizes) if all(sizes) else None)

    # -- what cards tell ---------------------------------------------------------------------------------------------

    @property
    def report(self) -> ContinualReport | None:
        """The task matrix and its metrics as `hf_ext.publish` and `build_card` tell them; None before the first task is learnt."""
        option = "share of rows whose answer is the most probable option"
        tokens = "mean share of answer tokens that are the most probable ones"
        told = [
            f"`{task.name}`: {option if task.options else tokens}." for task in self.tasks if task.eval is not None
        ]
        return ContinualReport(self.matrix, (*told, *self.notes())) if self._rows else None

    def notes(self) -> tuple[str, ...]:
        """Further sentences for the cards."""
        return ()


def _answer_tokens(row: Any) -> int:
    return sum(label != -100 for label in row["labels"])


def _check(args: SFTConfig) -> None:
    if args.eval_strategy != IntervalStrategy.NO:
        raise ValueError(
            f"eval_strategy={IntervalStrategy(args.eval_strategy).value!r} has no place in a sequence: the tasks' eval rows are scored after every task."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True starts again inside a task, with gradients of the attempt that failed: set the batch size."
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy={HubStrategy(args.hub_strategy).value!r} would let the checkpoints of one task replace another's on the Hub: use "
            "'every_save' or 'end'."
        )
