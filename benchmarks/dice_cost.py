"""What recording and replaying cost next to ordinary sampling, and what stored residuals weigh.

A RoBERTa-base (random weights, 50,265 tokens) with texts of 24 words, one and four at once, in 8 steps; and an aMUSEd model of 100 million weights with pictures of 16 x 16 codes, 8,192 of them, in 4 steps with guidance. The peer is a run without
residuals: the same forward passes with Gumbel noise.

    python -m benchmarks.dice_cost
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import UVit2DModel, VQModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from benchmarks.common import write
from benchmarks.cost import Line, compare, keep_freed_memory, show, table_of_peers, time_line
from examples.edit_a_digit import parts_for
from examples.edit_a_review import SPECIAL
from hf_ext import DiceMaskedImagePipeline, DiceTextEditPipeline

NAME, VOCABULARY, WORDS, CODES, SIDE = "dice_cost", 50265, 24, 8192, 16


class Size(NamedTuple):
    """How much is measured: steps of a text and of a picture, pairs of a text and of larger work, and with `every` four texts, too."""

    text_steps: int
    picture_steps: int
    texts: int
    larger: int
    every: bool


FULL, SMALL = Size(8, 4, 5, 3, True), Size(2, 2, 3, 2, False)
# Of all comparisons, those that are made for larger work, too.
CHOSEN = ("recording, residuals stored", "edit, residuals computed again")


def texts_pipeline() -> DiceTextEditPipeline:
    words = [*SPECIAL, *(f"w{number}" for number in range(VOCABULARY - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return DiceTextEditPipeline(RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, pad_token_id=1)), fast)


def pictures_pipeline() -> DiceMaskedImagePipeline:
    vqvae = VQModel(num_vq_embeddings=CODES, block_out_channels=(8, 8), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    parts = parts_for(vqvae, CODES)
    parts["transformer"] = UVit2DModel(
        hidden_size=768, cond_embed_dim=16, micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=16,
        vocab_size=CODES + 1, codebook_size=CODES, in_channels=256, block_out_channels=256, num_res_blocks=1,
        block_num_heads=4, num_hidden_layers=8, num_attention_heads=12, intermediate_size=2048, sample_size=SIDE,
    )  # fmt: skip
    return DiceMaskedImagePipeline(**parts)


def works(
    pipe: Any, source: Any, prompt: str, target: str, steps: int
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What is compared: ours and the peer."""

    def invert(store: bool = False) -> Any:
        return pipe.invert(source, prompt, num_inference_steps=steps, anchor="onehot", store_residuals=store)

    lazy, stored = invert(), invert(True)

    def sampled() -> Any:
        return pipe.edit(lazy, target, lambda1=0.0, lambda2=1.0, output_type="seq")

    return {
        "recording, residuals stored": (lambda: invert(True), sampled),
        "recording, residuals not stored": (invert, sampled),
        "edit, residuals stored": (lambda: pipe.edit(stored, target, lambda1=0.7, output_type="seq"), sampled),
        "edit, residuals computed again": (lambda: pipe.edit(lazy, target, lambda1=0.7, output_type="seq"), sampled),
        "reconstruction": (lambda: pipe.reconstruct(lazy, output_type="seq"), sampled),
    }


def sweep(pipe: Any, source: str, prompt: str, target: str, steps: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    strengths = [0.2, 0.4, 0.6, 0.8]
    trace = pipe.invert(source, prompt, num_inference_steps=steps, anchor="onehot")

    def together() -> Any:
        return pipe.edit(trace, target, lambda1=strengths, output_type="seq")

    def apart() -> Any:
        return [pipe.edit(trace, target, lambda1=strength, output_type="seq") for strength in strengths]

    return together, apart


def growth(pipe: Any, source: Any, prompt: str) -> dict[int, int]:
    """Bytes of a recording with stored residuals, by number of steps."""
    options = dict(anchor="onehot", store_residuals=True)
    return {steps: pipe.invert(source, prompt, num_inference_steps=steps, **options).nbytes for steps in (2, 4, 8)}


def text(generator: torch.Generator) -> str:
    return " ".join(f"w{int(number)}" for number in torch.randint(1000, (WORDS,), generator=generator))


def pipelines() -> tuple[Any, Any]:
    """Of texts and of pictures."""
    made: tuple[Any, Any] = texts_pipeline(), pictures_pipeline()
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    return made


def measure(size: Size) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    texts, pictures = pipelines()
    rows: list[dict[str, Any]] = []

    def add(name: str, peer: str, pair: tuple[Callable[[], Any], Callable[[], Any]], repeats: int) -> None:
        row = {"name": name, "peer": peer, **compare(*pair, repeats=repeats)}
        show(name, row)
        rows.append(row)

    for name, pair in works(texts, text(generator), "w1 w2 w3", "w4 w5", size.text_steps).items():
        add(f"a text: {name}", "sampling", pair, size.texts)
    if size.every:
        several = works(texts, [text(generator) for _ in range(4)], "w1 w2 w3", "w4 w5", size.text_steps)
        for name in CHOSEN:
            add(f"four texts: {name}", "sampling", several[name], size.larger)
    at_once = sweep(texts, text(generator), "w1 w2", "w3", size.text_steps)
    add("four strengths of a text at once", "one by one", at_once, size.larger)
    codes = torch.randint(CODES, (1, SIDE, SIDE), generator=generator)
    chosen = works(pictures, codes, "one", "two", size.picture_steps)
    for name in CHOSEN:
        add(f"a picture: {name}", "sampling", chosen[name], size.larger)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    return table_of_peers(rows, "seconds")


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    """Sampling does the same forward passes, but for residuals that are computed again and recordings that need none."""
    found = []
    for row in rows:
        steps = size.picture_steps if "picture" in row["name"] else size.text_steps
        bar = None if "computed again" in row["name"] else 1.0
        found.append(time_line({**row, "name": f"{row['name']}, {steps} steps"}, row["peer"], bar))
    return found


def main() -> None:
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    rows = measure(FULL)
    texts, pictures = pipelines()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(CODES, (1, SIDE, SIDE), generator=generator)
    weights = {
        "texts": growth(texts, [text(generator), text(generator)], "w1"),
        "pictures": growth(pictures, codes, "one"),
    }
    note = (
        f"float32, {torch.get_num_threads()} threads; medians. A recording without residuals weighs {size(lazy_bytes(pictures, codes))} for the picture. "
        f"With them it is 4 S B N V bytes more: {size(4 * 8 * SIDE * SIDE * CODES)} for 8 steps of the picture, measured "
        + ", ".join(f"{size(value)} in {steps} steps" for steps, value in weights["pictures"].items())
        + ". `python -m benchmarks.dice_cost` repeats it."
    )
    report = {"command": f"python -m benchmarks.{NAME}", "rows": rows, "bytes": weights}
    write(NAME, report | {"table": f"{table(rows)}\n\n{note}"})


def lazy_bytes(pipe: Any, codes: torch.Tensor) -> int:
    return pipe.invert(codes, "one", num_inference_steps=8, anchor="onehot").nbytes


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


if __name__ == "__main__":
    main()
