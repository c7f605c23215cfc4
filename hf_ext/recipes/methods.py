"""Which methods are trained from a recipe, and with what. Plain data: reading it imports no library."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from hf_ext.registry import METHODS

# Any of these sets of columns will do; the column that `dataset_text_field` names is one more.
TEXTS = (("prompt", "completion"), ("messages",), ("input_ids",))
PAIRS = (("chosen", "rejected"),)
_DATA = ("trl:ScriptArguments", "trl:DatasetMixtureConfig")
_ARGUMENTS = "hf_ext.recipes.arguments"
_PEFT = f"{_ARGUMENTS}:PeftArguments"
_SFT = "hf_ext.trainers.cards:SFTTrainer"
CARD = f"{_ARGUMENTS}:CardArguments"


@dataclass(frozen=True)
class Trained:
    """How one method is trained. Classes are written as `module:name`.

    Attributes:
        trainer: the class.
        config: of its `args`.
        arguments: dataclasses whose fields a recipe may have besides those of `config`, `trl.ModelConfig` and `CardArguments`.
        columns: what the data may look like.
        peft_type: the adapter that the method trains; None where that is the recipe's choice.
        streams: whether the data may be a stream.
    """

    trainer: str
    config: str
    arguments: tuple[str, ...] = (*_DATA, _PEFT)
    columns: tuple[tuple[str, ...], ...] = TEXTS
    peft_type: str | None = None
    streams: bool = True


TRAINED = {
    "roselora": Trained(_SFT, "trl:SFTConfig", peft_type="ROSELORA"),
    "overtone": Trained("hf_ext.trainers.overtone:OvertoneTrainer", "hf_ext.trainers.overtone:OvertoneConfig"),
    "flat": Trained(
        "hf_ext.trainers.flat:UnlearnTrainer",
        "hf_ext.trainers.flat:UnlearnConfig",
        (*_DATA, _PEFT, f"{_ARGUMENTS}:RetainArguments"),
        (("prompt", "completion"), *PAIRS),
        streams=False,
    ),
    "adaptive_svd": Trained(
        "hf_ext.trainers.adaptive_svd:AdaptiveSVDTrainer",
        "hf_ext.trainers.adaptive_svd:AdaptiveSVDConfig",
        (f"{_ARGUMENTS}:SequenceArguments",),
    ),
    "roserag": Trained(
        "hf_ext.trainers.roserag:RoseRAGTrainer",
        "hf_ext.trainers.roserag:RoseRAGConfig",
        (*_DATA, _PEFT, f"{_ARGUMENTS}:PromptArguments"),
        PAIRS,
    ),
    "neat": Trained(_SFT, "trl:SFTConfig", peft_type="NEAT"),
    "baft": Trained(
        "hf_ext.trainers.baft:BaftTrainer",
        "hf_ext.trainers.baft:BaftTrainerConfig",
        (*_DATA, _PEFT, f"{_ARGUMENTS}:LocalityArguments"),
        peft_type="BAFT",
        streams=False,
    ),
}

NOT_TRAINED = {
    "squat": "it is a cache that is handed to `generate`, and trains nothing",
    "tfb": "it is fitted to a finished adapter by `bayesianize`, without training",
    "lorvp": "it is trained on pictures, with `transformers.Trainer` and an image processor",
    "dice": "it edits with a model as it is, and trains nothing",
}


def find(slug: str) -> Trained:
    """How the method `slug` is trained.

    Raises:
        ValueError: it is not trained from a recipe, or unknown.
    """
    if slug in TRAINED:
        return TRAINED[slug]
    for method in METHODS:
        if method.slug == slug:
            raise ValueError(f"{method.name} has no recipe: {NOT_TRAINED[slug]}. See {method.docs_page}.")
    near = "".join(f" Did you mean {name}?" for name in get_close_matches(slug.lower(), TRAINED, 1))
    raise ValueError(f"the method {slug!r} is unknown.{near} Trained from a recipe: {', '.join(TRAINED)}.")
