"""Pipelines that are saved with their own code, so that they can be loaded where hf_ext is not installed."""

from __future__ import annotations

import importlib
import inspect
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from diffusers.loaders import PeftAdapterMixin as ModelOfDiffusers
from huggingface_hub import create_repo, upload_folder
from transformers.integrations import PeftAdapterMixin as ModelOfTransformers

_OF_THE_HUB = ("repo_id", "commit_message", "private", "token", "create_pr")


class Published:
    """`save_pretrained` and `push_to_hub` of a pipeline, with its code and a card."""

    components: Any
    _output_types: ClassVar[tuple[str, ...]]
    config: Any

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *arguments: Any, push_to_hub: bool = False, **options: Any
    ) -> None:
        """As that of `DiffusionPipeline`; also writes `pipeline.py`, the code of this pipeline for those who do not have hf_ext.

        Raises:
            ValueError: a component could not be loaded again: it has adapters, or is of remote code.
        """
        for name, component in self.components.items():
            kind = type(component)
            if kind.__module__.startswith("peft."):
                raise ValueError(
                    f"{name} is a {kind.__name__}, which diffusers does not save: set pipeline.{name} = pipeline.{name}.merge_and_unload() first, or save the adapter on its own."
                )
            # The public methods of both libraries raise where there are none.
            if isinstance(component, ModelOfTransformers | ModelOfDiffusers) and component._hf_peft_config_loaded:
                raise ValueError(
                    f"{name} has adapters, which would be saved in the place of its weights: call pipeline.{name}.delete_adapter(...) first, and save the adapters on their own."
                )
            if kind.__module__.startswith("transformers_modules."):
                raise ValueError(
                    f"{name} is a {kind.__name__} of remote code, which diffusers could not load again: save the model and the tokenizer with their own save_pretrained, and the trace with trace.save."
                )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        source = own_source(type(self))
        if source is not None:
            aside = folder / f".pipeline.{os.getpid()}.part"
            aside.write_text(source, encoding="utf-8")
            os.replace(aside, folder / "pipeline.py")
        hub = {name: options.pop(name) for name in list(options) if push_to_hub and name in _OF_THE_HUB}
        super().save_pretrained(str(folder), *arguments, **options)  # type: ignore[misc]
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.name), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> Any:
        """Upload the pipeline, its code and, with hf_ext, a card in one commit. What others wrote in a card stays.

        `hf_ext.publish` takes what only its author can say of it, and runs the code in the card first.

        Args:
            repo_id: `namespace/name`; created if it does not exist.
            commit_message, private, token, create_pr, safe_serialization, variant: as in diffusers.
        """
        repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            # Where this module was loaded from a repository, hf_ext may be missing, and the card there stays as it is.
            if type(self).__module__.startswith("hf_ext."):
                importlib.import_module("hf_ext.model_cards.beside").write_remote_card(self, Path(folder), repo, token)
            return upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                token=token,
                create_pr=create_pr,
            )


def own_source(cls: type) -> str | None:
    """The code of a pipeline in one file; None for a class that is neither ours nor loaded from such a file."""
    package = cls.__module__.split(".")[0]
    if package == "hf_ext":
        return importlib.import_module("hf_ext.pipelines.standalone").standalone_source(cls.__module__)
    if package == "diffusers_modules":
        return inspect.getsource(importlib.import_module(cls.__module__))
    return None
