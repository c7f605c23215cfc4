"""`hf-ext train`: a trainer made from a recipe, run, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

from hf_ext.demo.model import EMBEDDED_MODEL_ID, embedded_model
from hf_ext.recipes.arguments import CardArguments, Further, PeftArguments
from hf_ext.recipes.data import train_and_eval
from hf_ext.recipes.methods import Trained, find
from hf_ext.recipes.parsing import parse, resolve
from hf_ext.tuners.roselora import RoseLoraCallback, RoseLoraConfig

EMBEDDED = "embedded"


def train(slug: str, arguments: Sequence[str]) -> int:
    """Train the method `slug` as the arguments of the command say, save the model with its card, and return an exit code.

    Raises:
        ValueError: the method, a key, a value or the data cannot be used; nothing is written then.
        OSError: something that the recipe names is not there.
    """
    method = find(slug)
    parsed, given = parse(slug, method, arguments)
    args, model = parsed[resolve(method.config)], parsed[ModelConfig]
    resume = {"true": True, "false": None}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    options = _options(method, parsed, given, resume)
    embedded = model.model_name_or_path == EMBEDDED
    origin = {"base_model": EMBEDDED_MODEL_ID, "license": "gemma"} if embedded else {}
    words = {**origin, **parsed[CardArguments].words()}
    with args.main_process_first():
        source = str(embedded_model()) if embedded else model.model_name_or_path
        _check_model(source, model, args)
    with _leaving_nothing(Path(args.output_dir)):
        trainer = resolve(method.trainer)(source, args, **options)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.eval_dataset is not None and args.eval_strategy == "no":
        trainer.evaluate()
    if args.push_to_hub:
        trainer.push_to_hub(**words)
    else:
        trainer.save_model()
        trainer.create_model_card(**words)
    _end(trainer)
    return 0


@contextmanager
def _leaving_nothing(folder: Path) -> Iterator[None]:
    """`Trainer` makes its folder before the last of its subclasses has looked at its arguments."""
    fresh = not folder.exists()
    try:
        yield
    except BaseException:
        if fresh:
            with suppress(OSError):  # there is none, or something in it
                folder.rmdir()
        raise


def _options(method: Trained, parsed: dict[type, Any], given: set[str], resume: str | bool | None) -> dict[str, Any]:
    """Keyword arguments of the trainer, all checked."""
    args, model = parsed[resolve(method.config)], parsed[ModelConfig]
    if model.model_name_or_path is None:
        raise ValueError(
            f"model_name_or_path is missing: give a Hub id or a folder, or {EMBEDDED!r} for the {EMBEDDED_MODEL_ID} that comes as a package."
        )
    _check_lora(method, parsed, given)
    options: dict[str, Any] = {}
    peft = parsed[PeftArguments].config(method.peft_type) if PeftArguments in parsed else None
    peft = peft or get_peft_config(model)
    if isinstance(peft, RoseLoraConfig):
        options["callbacks"] = [RoseLoraCallback(resume if isinstance(resume, str) else None)]
    with args.main_process_first():
        if ScriptArguments in parsed:
            options |= _data(method, parsed, given)
        for each in parsed.values():
            if isinstance(each, Further):
                options |= each.for_trainer()
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    return {**options, "peft_config": peft, "quantization_config": get_quantization_config(model)}


def _check_model(source: str, model: ModelConfig, args: Any) -> None:
    """Name the key, which the errors of the libraries do not."""
    try:
        AutoConfig.from_pretrained(source, revision=model.model_revision, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise OSError(f"model_name_or_path={source!r} cannot be loaded: {error}") from error


def _check_lora(method: Trained, parsed: dict[type, Any], given: set[str]) -> None:
    own = sorted(name for name in given if name.startswith("lora_") or name in ("use_rslora", "use_dora"))
    if method.peft_type is not None and (own or parsed[ModelConfig].use_peft):
        name = own[0] if own else "use_peft"
        raise ValueError(f"{name} is for LoRA, and this method trains {method.peft_type}: say it under peft instead.")
    if own and not parsed[ModelConfig].use_peft:
        raise ValueError(f"{own[0]} has no effect without use_peft: true; add that, or leave it out.")
    if parsed[ModelConfig].use_peft and "peft" in given:
        raise ValueError("use_peft and peft name an adapter each: leave one of them out.")


def _data(method: Trained, parsed: dict[type, Any], given: set[str]) -> dict[str, Any]:
    args, script, mixture = parsed[resolve(method.config)], parsed[ScriptArguments], parsed[DatasetMixtureConfig]
    if not method.streams and (script.dataset_streaming or mixture.streaming):
        raise ValueError("dataset_streaming=True: this method needs to know all rows; leave it out.")
    if script.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers=True has no effect here: leave it out.")
    forms = (*method.columns, (args.dataset_text_field,)) if isinstance(args, SFTConfig) else method.columns
    evaluates = args.do_eval or "dataset_test_split" in given or mixture.test_split_size is not None
    return train_and_eval(script, mixture, evaluates, forms)


def _end(trainer: Any) -> None:
    """Leave the group of processes, without the wrapper for data parallelism.

    Its reducer would be the last to hold the group, and free it with Python's lock held, for which a thread of the group may wait forever.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.end()
