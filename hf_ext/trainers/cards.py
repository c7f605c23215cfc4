"""Trainers that write the whole card, wherever the library writes one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import trl
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ext.model_cards.beside import write_card


class CardMixin(Trainer):
    """For a trainer of TRL, before its class: `create_model_card`, and with it `push_to_hub`, write the card of `hf_ext.build_card`.

    PEFT writes a template over the card of a folder that an adapter is saved into; `save_model` puts ours in its place.
    Checkpoints keep what the library writes.
    """

    def create_model_card(  # type: ignore[override]  # TRL's arguments, not those of transformers
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **card_arguments: Any,
    ) -> None:
        """Write README.md into `output_dir`; what people wrote around our part of it stays.

        Args:
            model_name: name of the model in the metadata.
            dataset_name: Hub id of the training data.
            tags: more tags.
            card_arguments: of `hf_ext.build_card`, such as `license=` and `intended_use=`.
        """
        if not self.is_world_process_zero():
            return
        if self._is_sharded():
            super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)  # type: ignore[call-arg]
            return
        if dataset_name is not None:
            card_arguments["datasets"] = dataset_name
        write_card(self, Path(str(self.args.output_dir)), model_name=model_name, tags=tags, **card_arguments)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s, with our card beside the model."""
        folder = Path(output_dir or str(self.args.output_dir))
        readme = folder / "README.md"
        before = readme.read_bytes() if readme.is_file() else b""
        super().save_model(output_dir, _internal_call)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR) or not self.is_world_process_zero() or self._is_sharded():
            return
        try:
            write_card(self, folder, before=before.decode("utf-8"))
        except ValueError as error:
            # The model is saved; a card can be written later.
            if before:
                readme.write_bytes(before)
            warnings.warn(f"no card was written into {folder}: {error}", stacklevel=2)

    def _is_sharded(self) -> bool:
        """Whether this process has only parts of the parameters, so that nothing true can be said of their number."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()


class SFTTrainer(CardMixin, trl.SFTTrainer):
    """TRL's, with our card."""
