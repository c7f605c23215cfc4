"""What recording and replaying cost next to ordinary sampling, and what stored residuals weigh.

A RoBERTa-base (random weights, 50,265 tokens) with texts of 24 words, one and four at once, in 8 steps; and an aMUSEd model of 100 million weights with pictures of 16 x 16 codes, 8,192 of them, in 4 steps with guidance. The peer is a run without
residuals: the same forward passes with Gumbel noise.

    python -m benchmarks.dice_cost
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UVit2DModel, VQModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from benchmarks.common import markdown, write
from benchmarks.cost import compare, keep_freed_memory, show
from examples.edit_a_digit import parts_for
from examples.edit_a_review import SPECIAL
from hf_ext import DiceMaskedImagePipeline, DiceTextEditPipeline

NAME, VOCABULARY, WORDS, CODES, SIDE = "dice_cost", 50265, 24, 8192, 16
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


def main() -> None:
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        return " ".join(f"w{int(number)}" for number in torch.randint(1000, (WORDS,), generator=generator))

    rows: list[dict[str, Any]] = []

    def measure(name: str, peer: str, pair: tuple[Callable[[], Any], Callable[[], Any]], repeats: int) -> None:
        row = {"name": name, "peer": peer, **compare(*pair, repeats=repeats)}
        show(name, row)
        rows.append(row)

    pipe: Any = texts_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for name, pair in works(pipe, text(), "w1 w2 w3", "w4 w5", 8).items():
        measure(f"a text: {name}", "sampling", pair, 5)
    several = works(pipe, [text() for _ in range(4)], "w1 w2 w3", "w4 w5", 8)
    for name in CHOSEN:
        measure(f"four texts: {name}", "sampling", several[name], 3)
    measure("four strengths of a text at once", "one by one", sweep(pipe, text(), "w1 w2", "w3", 8), 3)
    weights = {"texts": growth(pipe, [text(), text()], "w1")}
    pipe = pictures_pipeline()
    pipe.set_progress_bar_config(disable=True)
    codes = torch.randint(CODES, (1, SIDE, SIDE), generator=generator)
    pictures = works(pipe, codes, "one", "two", 4)
    for name in CHOSEN:
        measure(f"a picture: {name}", "sampling", pictures[name], 3)
    weights["pictures"] = growth(pipe, codes, "one")
    note = (
        f"float32, {torch.get_num_threads()} threads; medians. A recording without residuals weighs {size(lazy_bytes(pipe, codes))} for the picture. "
        f"With them it is 4 S B N V bytes more: {size(4 * 8 * SIDE * SIDE * CODES)} for 8 steps of the picture, measured "
        + ", ".join(f"{size(value)} in {steps} steps" for steps, value in weights["pictures"].items())
        + ". `python -m benchmarks.dice_cost` repeats it."
    )
    cells = [
        [
            row["name"],
            row["peer"],
            f"{row['seconds']['ours']:.2f} / {row['seconds']['peer']:.2f}",
            f"{row['time_ratio']:.2f} [{row['time_ratio_min']:.2f}, {row['time_ratio_max']:.2f}]",
            f"{row['peak_mib']['ours']:.0f} / {row['peak_mib']['peer']:.0f}",
        ]
        for row in rows
    ]
    head = ["work", "peer", "CPU seconds, ours / peer", "ratio [min, max]", "MiB at most, ours / peer"]
    table = markdown(head, cells) + "\n\n" + note
    write(NAME, {"command": f"python -m benchmarks.{NAME}", "rows": rows, "bytes": weights, "table": table})
    print(table)


def lazy_bytes(pipe: Any, codes: torch.Tensor) -> int:
    return pipe.invert(codes, "one", num_inference_steps=8, anchor="onehot").nbytes


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


if __name__ == "__main__":
    main()
