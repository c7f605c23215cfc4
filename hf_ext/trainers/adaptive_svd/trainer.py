"""`AdaptiveSVDTrainer`: full fine-tuning on one task after another, each inside what the earlier ones left free."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_ext.registry import ADAPTIVE_SVD
from hf_ext.trainers.adaptive_svd.config import EIGHT_BIT, AdaptiveSVDConfig
from hf_ext.trainers.adaptive_svd.importance import (
    LayerStatistics,
    is_degenerate,
    rank_from_energy,
    ranks_from_ratios,
    retained_ratios,
)
from hf_ext.trainers.adaptive_svd.optimizer import SubspaceAdamW
from hf_ext.trainers.adaptive_svd.subspace import Subspace, drift, protect, singular_basis
from hf_ext.trainers.adaptive_svd.taps import tap
from hf_ext.trainers.adaptive_svd.targets import Layer, find_targets, observe
from hf_ext.trainers.runs import arguments_of
from hf_ext.trainers.task_sequence import TaskSequenceTrainer
from hf_ext.trainers.tasks import ContinualTask

SUBSPACE_FILE = "subspace.safetensors"


class AdaptiveSVDTrainer(TaskSequenceTrainer):
    """Learn tasks one after another without forgetting: adaptive SVD (https://huggingface.co/papers/2504.07097).

    Before each task the weight of every targeted layer is split into its largest singular directions, which are protected, and
    the rest; the optimizer moves it inside the rest alone. The model stays an ordinary one with its own parameters at any
    moment: checkpoints have nothing added, and the forward pass costs nothing.

    The ranks of each task, what they were chosen from, and the singular vectors are in `subspace.safetensors` in the folder of
    the task; `ranks` holds them for the present one.

    Args:
        model: as for `SFTTrainer`, not quantised and without adapters.
        args: an `AdaptiveSVDConfig`; its defaults if not given.
        tasks: `ContinualTask`s, or a mapping of names to training datasets.
        kwargs: as for `SFTTrainer`.

    Raises:
        TypeError: `args` is not an `AdaptiveSVDConfig`.
        ValueError: a model or an option that does not go with subspaces; see `find_targets` too.

    Example:
        ```python
        from datasets import Dataset
        from hf_ext.trainers.adaptive_svd import AdaptiveSVDConfig, AdaptiveSVDTrainer, ContinualTask

        spanish = Dataset.from_list([{"prompt": "dog in Spanish:", "completion": " perro"}])
        french = Dataset.from_list([{"prompt": "dog in French:", "completion": " chien"}])
        tasks = [ContinualTask("spanish", spanish, spanish), ContinualTask("french", french, french)]
        trainer = AdaptiveSVDTrainer("google/gemma-3-270m", AdaptiveSVDConfig("languages"), tasks)
        trainer.train()
        print(trainer.matrix.table())
        ```
    """

    _tag_names = ["trl", "sft", "adaptive_svd", "continual-learning"]  # noqa: RUF012
    _name = ADAPTIVE_SVD.name
    _paper = {"title": ADAPTIVE_SVD.paper_title, "id": ADAPTIVE_SVD.arxiv, "citation": ADAPTIVE_SVD.citation}  # noqa: RUF012
    args: AdaptiveSVDConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: AdaptiveSVDConfig | None = None,
        tasks: Iterable[ContinualTask] | Mapping[str, Any] = (),
        **kwargs: Any,
    ) -> None:
        args = arguments_of(args, AdaptiveSVDConfig, model, type(self), ADAPTIVE_SVD.slug)
        for name in ("peft_config", "quantization_config", "optimizer_cls_and_kwargs"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} does not go with subspaces of plain weights: leave it out.")
        if any(part is not None for part in kwargs.get("optimizers", ())):
            raise ValueError("optimizers: every task makes its own; set optim, learning_rate and their like in args.")
        if isinstance(model, PeftModel):
            raise ValueError(
                "the model has adapters, and adaptive SVD trains the weights: call merge_and_unload() first."
            )
        super().__init__(model, args, tasks, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "DeepSpeed and FSDP keep weights or gradients in pieces, which have no singular vectors: use plain data "
                "parallelism (DDP)."
            )
        self._layers = find_targets(self.model, args.target_modules)
        self._subspaces: dict[str, Subspace] = {}
        self._taps: list[RemovableHandle] = []
        self._targeted = {layer.weight for layer in self._layers.values()}
        rounded = [
            n
            for n, p in self.model.named_parameters()
            if p.requires_grad and p.dtype != torch.float32 and p not in self._targeted
        ]
        if rounded and args.unprotected_lr_scale:
            warnings.warn(
                f"{len(rounded)} trained parameters without a subspace, such as {rounded[0]}, are not in float32, and small updates added "
                "to them are rounded away: load the model in float32 and set bf16=True, or freeze them with unprotected_lr_scale=0.",
                stacklevel=2,
            )
        if args.unprotected_lr_scale == 0:
            for parameter in self.model.parameters():
                parameter.requires_grad_(parameter in self._targeted)

    # -- tasks -------------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> dict[str, int]:
        """Protected directions of each layer in the present task."""
        return {name: self._subspaces[name].rank if name in self._subspaces else 0 for name in self._layers}

    def _sizes(self) -> dict[str, int]:
        """Singular directions of each layer."""
        return {name: min(layer.weight.shape) for name, layer in self._layers.items()}

    def before_task(self, number: int, resumed: bool) -> None:
        path = self.folder_of(number) / SUBSPACE_FILE
        if resumed:
            self._subspaces = _load(path, self._layers)
        else:
            ranks, bases, report = self._choose_ranks(number)
            self._subspaces = {}
            for name, layer in self._layers.items():
                if ranks[name]:
                    basis = bases.get(name) or singular_basis(layer.weight)
                    self._subspaces[name] = protect(layer.weight, basis, ranks[name])
                elif layer.weight.dtype != torch.float32:
                    # In any basis, so that the change is kept in float32; in float32 it is trained as any other.
                    size = min(layer.weight.shape)
                    basis = (
                        torch.eye(size, device=layer.weight.device),
                        layer.weight.new_zeros(size, dtype=torch.float32),
                    )
                    self._subspaces[name] = protect(layer.weight, basis, 0)
            if self._keeps_files and self.is_world_process_zero():
                _save(self._subspaces, ranks, report, path)
        equal = [name for name, subspace in self._subspaces.items() if subspace.cuts_between_equals]
        if equal and not resumed:
            warnings.warn(
                f"task {self.tasks[number].name!r}: of {equal[0]} and {len(equal) - 1} other layers, the last protected singular "
                "value is as large as the first free one, so which of their directions is protected depends on rounding.",
                stacklevel=3,
            )
        if self.ranks == self._sizes() and self.args.unprotected_lr_scale == 0:
            raise ValueError(
                f"task {self.tasks[number].name!r}: every direction is protected, so nothing is left to train."
            )

    def restore_task(self, number: int) -> None:
        path = self.folder_of(number) / SUBSPACE_FILE
        self._subspaces = _load(path, self._layers) if path.is_file() else {}

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"layers": list(self._layers), "projection": self.args.projection}

    def _choose_ranks(self, number: int) -> tuple[dict[str, int], dict[str, tuple[Tensor, Tensor]], dict]:
        """Ranks of all layers, singular bases that were needed for them, and what they were chosen from."""
        sizes = self._sizes()
        if number == 0 or self.args.rank_rule == "uniform":
            share = self.args.target_retention if number else self.args.first_task_retention
            return ranks_from_ratios(dict.fromkeys(sizes, share), sizes), {}, {"rank_rule": "uniform", "share": share}
        if self.args.rank_rule == "energy":
            bases = {name: singular_basis(layer.weight) for name, layer in self._layers.items()}
            found = self._observe(number - 1, {name: vectors for name, (vectors, _) in bases.items()})
            share = self.args.retained_energy
            ranks = {name: rank_from_energy(kept.energies(bases[name][1]), share) for name, kept in found.items()}
            return ranks, bases, {"rank_rule": "energy", "share": share}
        importance = {name: kept.cosine for name, kept in self._observe(number - 1).items()}
        ratios = retained_ratios(
            importance, self.args.minimum_retention, self.args.target_retention, self.args.importance_score
        )
        reason = is_degenerate(importance, ratios)
        if reason is not None:
            warnings.warn(
                f"task {self.tasks[number].name!r}: {reason}, so the ranks say little about the layers; rank_rule='energy' "
                "or 'uniform' does not depend on these cosines.",
                stacklevel=4,
            )
        return ranks_from_ratios(ratios, sizes), {}, {"rank_rule": "adaptive", "importance": importance}

    def _observe(self, number: int, bases: Mapping[str, Tensor] | None = None) -> dict[str, LayerStatistics]:
        """What passes the layers on the first rows of a task; every process sees the same ones."""
        data = self.prepared(number)
        data = data.select(range(min(self.args.importance_rows, len(data))))
        device = self.accelerator.device
        batches = ({name: value.to(device) for name, value in batch.items()} for batch in self.plain_loader(data))
        backbone = self.accelerator.unwrap_model(self.model).base_model
        with self.accelerator.autocast():
            return observe(backbone, self._layers, batches, bases)

    def release_task(self, number: int) -> None:
        for handle in self._taps:
            handle.remove()
        self._taps.clear()
        for weight in self._targeted:
            weight.requires_grad_(True)

    def after_task(self, number: int) -> None:
        # Without one the task was only read back from its last checkpoint.
        reached = self._subspace_optimizer().state if self.optimizer is not None else self._targeted
        idle = [name for name in self._subspaces if self._layers[name].weight not in reached]
        if idle:
            warnings.warn(
                f"task {self.tasks[number].name!r}: no gradient reached {idle[0]} and {len(idle) - 1} other layers, so they were "
                "not trained.",
                stacklevel=3,
            )
        drifts = [drift(self._layers[name].weight.detach(), subspace) for name, subspace in self._subspaces.items()]
        self.log({"subspace/drift": max(drifts, default=0.0)})

    def notes(self) -> tuple[str, ...]:
        sizes = self._sizes()
        shares = [rank / sizes[name] for name, rank in self.ranks.items()]
        return (
            f"Singular directions protected during the last task: {sum(shares) / len(shares):.0%} of each of {len(shares)} "
            f"weights on average, from {min(shares):.0%} to {max(shares):.0%}.",
        )

    # -- optimizer ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        # Trainer logs the learning rate of the first group.
        parameters = sorted(self.model.named_parameters(), key=lambda item: item[1] not in self._targeted)
        for name, parameter in parameters:
            if parameter.requires_grad:
                scale = 1.0 if parameter in self._targeted else self.args.unprotected_lr_scale
                groups.setdefault((name in decayed, scale), []).append(parameter)
        _, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate = options.pop("lr")
        if self.args.optim in EIGHT_BIT:
            options = {name: options[name] for name in ("betas", "eps")}
        subspaces = {self._layers[name].weight: subspace for name, subspace in self._subspaces.items()}
        self.optimizer = optimizer = SubspaceAdamW(
            [
                {"params": found, "weight_decay": self.args.weight_decay if decays else 0.0, "lr": rate * scale}
                for (decays, scale), found in groups.items()
            ],
            subspaces,
            eight_bit=self._targeted if self.args.optim in EIGHT_BIT else (),
            joint=self.args.projection == "joint",
            lr=rate,
            **options,
        )
        # Data parallelism sums the gradients of the weights themselves, and the paper's formula needs them whole.
        if self.accelerator.num_processes == 1 and self.args.projection == "double":
            self._close_taps(optimizer, subspaces)
        return optimizer

    def _close_taps(self, optimizer: SubspaceAdamW, subspaces: Mapping[Tensor, Subspace]) -> None:
        """Compute gradients of protected weights in reduced coordinates, and none of the whole weights, during this task."""
        for layer in self._layers.values():
            if layer.weight in subspaces:
                receive = partial(optimizer.accumulate, layer.weight)
                self._taps.append(tap(layer, subspaces[layer.weight], receive))
                layer.weight.requires_grad_(False)

    def _subspace_optimizer(self) -> SubspaceAdamW:
        """The optimizer below accelerate's."""
        wrapped: Any = self.optimizer
        return wrapped.optimizer if isinstance(wrapped, AcceleratedOptimizer) else wrapped

    # Trainer's own two look at `.grad`, which protected weights do not have.

    def _clip_grad_norm(self, model: Any) -> Tensor:
        return self._subspace_optimizer().clip_grad_norm_(self.args.max_grad_norm, model.parameters())

    def _get_grad_norm(self, model: Any, grad_norm: Tensor | None = None) -> Tensor:
        if grad_norm is not None:
            return grad_norm
        return self._subspace_optimizer().clip_grad_norm_(math.inf, model.parameters())


def _save(subspaces: Mapping[str, Subspace], ranks: Mapping[str, int], report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.basis": subspace.basis_PP.cpu().contiguous() for name, subspace in subspaces.items()}
    tensors |= {f"{name}.values": subspace.values_P.cpu() for name, subspace in subspaces.items()}
    scratch = path.with_suffix(".tmp")
    save_file(tensors, scratch, {"ranks": json.dumps(ranks), "report": json.dumps(report)})
    scratch.replace(path)


def _load(path: Path, layers: Mapping[str, Layer]) -> dict[str, Subspace]:
    if not path.is_file():
        raise ValueError(
            f"there is no {path}, without which the task cannot go on: start again in another output_dir."
        )
    with safe_open(path, "pt") as file:
        ranks = json.loads(file.metadata()["ranks"])
        if set(ranks) != set(layers):
            raise ValueError(f"{path} is of other layers: use the same model and target_modules as before.")
        found = {}
        stored = set(file.keys())
        for name, rank in ranks.items():
            if f"{name}.basis" in stored:
                weight = layers[name].weight
                basis, values = (file.get_tensor(f"{name}.{part}").to(weight.device) for part in ("basis", "values"))
                found[name] = protect(weight, (basis, values), rank)
        return found
