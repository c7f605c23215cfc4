"""A tokenizer of words, with the chat templates that models come with."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ext.pipelines.roserag.prompts import RagPrompts

_TURNS = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
CHAT = _TURNS
NO_SYSTEM = _TURNS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
SYSTEM_RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + _TURNS
SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end>", "unk_token": "<unk>"}
ANSWERS = ["Paris", "Rome", "Oslo", "Lima"]


def word_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Words, punctuation and white space of our prompts and some answers, and 99 numbered words."""
    texts = " ".join(
        [
            *(t for t in RagPrompts().__dict__.values() if isinstance(t, str)),
            *ANSWERS,
            "Reason because <user> <system> <assistant> 0 1 3",
        ]
    )
    splitter = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), "isolated")
    words = [piece for piece, _ in splitter.pre_tokenize_str(texts)]
    vocabulary = [*SPECIALS.values(), "\n", *words, *(f"w{n}" for n in range(99))]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(vocabulary))}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = splitter, decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **SPECIALS)
