"""Which source class stands for a class of the new task: counted from what the prompted model predicts, once or while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ext.tuners.lorvp.head import LorVpHead
from hf_ext.tuners.lorvp.reference import agreement, frequencies, greedy_mapping

ASSIGNMENTS = ("optimal", "greedy")


@dataclass(frozen=True)
class LabelMap:
    """A source class for each class of the new task, and how well the two agree.

    Attributes:
        sources: of each target class, the source class.
        agreement: share of images whose most probable source class is that of their target class.
        greedy_agreement: the same of the greedy map.
    """

    sources: list[int]
    agreement: float
    greedy_agreement: float


def optimal_mapping(counts_ST: Tensor) -> Tensor:
    """`(T,)`, int64: the map whose counts add up to most, by the Hungarian method.

    Raises:
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "assignment='optimal' needs scipy: pip install \"hf-ext[vision]\", or choose 'greedy'."
        ) from error
    sources, targets = linear_sum_assignment(counts_ST.cpu().numpy(), maximize=True)
    mapping_T = torch.empty(counts_ST.shape[1], dtype=torch.long)
    mapping_T[torch.as_tensor(targets)] = torch.as_tensor(sources)
    return mapping_T


def head_of(model: nn.Module) -> tuple[LorVpHead, str]:
    """The layer that maps classes, and its active adapter.

    Raises:
        ValueError: no adapter with a label map is active.
    """
    for module in model.modules():
        if isinstance(module, LorVpHead):
            for name in module.present(module.active_adapters):
                if name in module.lorvp_label_map:
                    return module, name
    raise ValueError(
        "no active adapter of the model has a label map: use LorVpConfig(head='label_map', num_labels=...)."
    )


@torch.no_grad()
def fit_label_map(model: nn.Module, batches: Iterable[dict[str, Any]], assignment: str = "optimal") -> LabelMap:
    """Give each class of the new task a source class, from what the prompted model predicts for labelled pictures (FLM).

    Args:
        model: with an active adapter whose head is `"label_map"`; its map is replaced.
        batches: arguments of the model, with `labels` of the new task, `(N,)`, -100 for none. In distributed runs each process has its own.
        assignment: `"optimal"`, the map that is right for most pictures, which needs scipy; `"greedy"`, the paper's, which takes the largest count again and again.

    Returns:
        The map and its share of pictures.

    Raises:
        ValueError: a class of the new task is in no batch, a label is out of range, or `assignment` is unknown.
    """
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment={assignment!r}: choose one of {', '.join(map(repr, ASSIGNMENTS))}.")
    head, adapter = head_of(model)
    targets, sources = len(head.labels[adapter]), head.out_features
    device = head.lorvp_label_map[adapter].device
    counts_ST = torch.zeros(sources, targets, dtype=torch.long, device=device)
    seen: list[Tensor] = []
    hook = head.get_base_layer().register_forward_hook(lambda layer, args, scores: seen.append(scores.argmax(-1)))
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            if "labels" not in inputs:
                raise ValueError(f"batches: one has {sorted(inputs)} and no labels, from which the map is counted.")
            labels_N = inputs.pop("labels")
            seen.clear()
            model(**inputs)
            known_N = labels_N != -100
            if bool((labels_N[known_N] < 0).any() or (labels_N[known_N] >= targets).any()):
                raise ValueError(
                    f"labels: {sorted({int(label) for label in labels_N.tolist()})} are not all in 0 to {targets - 1}, the classes of adapter {adapter!r}."
                )
            counts_ST += frequencies(seen[0][known_N], labels_N[known_N], sources, targets)
    finally:
        hook.remove()
        model.train(training)
    counts_ST = reduce(counts_ST, reduction="sum")
    if missing := (counts_ST.sum(0) == 0).nonzero().flatten().tolist():
        raise ValueError(f"labels: no picture of the classes {missing}, which can then be given no source class.")
    counts_ST = counts_ST.cpu()
    greedy_T = greedy_mapping(counts_ST)
    mapping_T = greedy_T if assignment == "greedy" else optimal_mapping(counts_ST)
    head.lorvp_label_map[adapter] = mapping_T.to(device)
    return LabelMap(mapping_T.tolist(), agreement(counts_ST, mapping_T), agreement(counts_ST, greedy_T))


class LabelMappingCallback(TrainerCallback):
    """Fits the label map of a LoR-VP adapter to the training data, at the start and after epochs (ILM).

    `trainer.state.log_history` gets `label_map/agreement`, the share of pictures whose most probable source class is that of their class, and `label_map/gain`, by how much that is above the greedy map.

    Args:
        every_n_epochs (`int`, *optional*): epochs between two fits. Default 1; None fits once, at the start (FLM).
        assignment (`str`): see [`fit_label_map`].

    Raises:
        ValueError: `every_n_epochs` or `assignment` is out of its range; when training begins, no active adapter has a label map.
    """

    def __init__(self, every_n_epochs: int | None = 1, assignment: str = "optimal") -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs!r}: give at least 1, or None for one fit at the start.")
        if assignment not in ASSIGNMENTS:
            raise ValueError(f"assignment={assignment!r}: choose one of {', '.join(map(repr, ASSIGNMENTS))}.")
        self.every_n_epochs, self.assignment = every_n_epochs, assignment
        self.fitted: LabelMap | None = None
        self._epochs = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        head_of(kwargs["model"])
        self._epochs = int(state.epoch or 0)
        if not state.global_step:  # a resumed run has the map of its checkpoint
            self._fit(args, kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epochs += 1
        if self.every_n_epochs is not None and self._epochs % self.every_n_epochs == 0:
            self._fit(args, kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.fitted is not None and "loss" in (kwargs["logs"] or {}):
            gain = self.fitted.agreement - self.fitted.greedy_agreement
            state.log_history[-1] |= {"label_map/agreement": self.fitted.agreement, "label_map/gain": gain}

    def _fit(self, args: TrainingArguments, given: dict[str, Any]) -> None:
        # A loader of its own: one more pass through that of the training would change the order of the next epoch.
        training = given["train_dataloader"]
        data = training.dataset
        if not isinstance(data, IterableDataset):
            data = Subset(data, range(args.process_index, len(data), args.world_size))
        batches = DataLoader(data, args.eval_batch_size, collate_fn=training.collate_fn)
        self.fitted = fit_label_map(given["model"], batches, self.assignment)
