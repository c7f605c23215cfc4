"""Turn a three into an eight, in the same hand: DICE with a masked image model.

    python examples/edit_a_digit.py [--folder demo-output/edited-digits]

A small VQ model learns to write scikit-learn's digits with 32 codes, and a small aMUSEd model (`UVit2DModel`) learns to put such codes together, told which digit it is. Then each digit is inverted under its own name and
edited to another one. `digits.png` shows them: as they are, as they come back, edited at several strengths, and painted anew. Some minutes on a CPU, without a network.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from hf_ext import DiceMaskedImagePipeline

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CODES, SIZE = 32, 16
STRENGTHS = (0.5, 0.3, 0.2, 0.1, 0.0)


def letter_tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    words = [*string.ascii_lowercase, " ", "<|end|>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(pad_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def parts_for(vqvae: VQModel, codes: int, seed: int = 0) -> dict[str, Any]:
    """Components of a small aMUSEd model; its text encoder is not trained, but tells prompts apart."""
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=28, hidden_size=16, projection_dim=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=27, eos_token_id=27, pad_token_id=27,
    )  # fmt: skip
    transformer = UVit2DModel(
        hidden_size=64, cond_embed_dim=16, micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=16,
        vocab_size=codes + 1, codebook_size=codes, in_channels=32, block_out_channels=32, num_res_blocks=1,
        block_num_heads=2, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, sample_size=8,
    )  # fmt: skip
    return dict(
        vqvae=vqvae,
        tokenizer=letter_tokenizer(),
        text_encoder=CLIPTextModelWithProjection(text).eval(),
        transformer=transformer,
        scheduler=AmusedScheduler(mask_token_id=codes),
    )


def learn_codes(pictures: Tensor, steps: int, seed: int = 0) -> VQModel:
    """A VQ model of pictures `(B, 3, H, W)` in [0, 1]; 2 x 2 pixels are a code."""
    torch.manual_seed(seed)
    sizes = dict(block_out_channels=(16, 32), latent_channels=8, norm_num_groups=8, num_vq_embeddings=CODES)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vqvae = VQModel(**sizes, **blocks, sample_size=SIZE, lookup_from_codebook=True, mid_block_add_attention=False)
    with torch.no_grad():
        latents = vqvae.encode(pictures[:256]).latents.movedim(1, -1).flatten(0, -2)
        vqvae.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:CODES]])
    optimizer = torch.optim.Adam(vqvae.parameters(), 2e-3)
    for _ in range(steps):
        batch = pictures[torch.randint(len(pictures), (64,))]
        found = vqvae(batch)
        (F.mse_loss(found.sample, batch) + 0.1 * found.commit_loss.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return vqvae.eval()


def learn_pictures(
    pipeline: DiceMaskedImagePipeline, codes: Tensor, prompts: list[str], steps: int = 1200, seed: int = 0
) -> None:
    """Train the transformer to mend pictures of codes `(B, h, w)`, any share of which is noise of the pipeline's kind; a tenth of the prompts are left out, for guidance."""
    torch.manual_seed(seed)
    transformer, count = pipeline.transformer.train(), pipeline.transformer.config.codebook_size
    side = codes.shape[-1] * pipeline.image_processor.config.vae_scale_factor
    names = ["", *dict.fromkeys(prompts)]
    which = torch.tensor([names.index(prompt) for prompt in prompts])
    with torch.no_grad():
        told = pipeline._condition(names, [side, side, 0, 0, 6])
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        rows = torch.randint(len(codes), (64,))
        labels, chosen = codes[rows], torch.where(torch.rand(64) < 0.1, 0, which[rows])
        hidden = torch.rand(labels.shape) < torch.rand(64, 1, 1)
        random_codes = torch.randint(count, labels.shape)
        masks_only = pipeline.config.noise == "mask"
        noise = torch.full_like(labels, count) if masks_only else random_codes
        logits = transformer(torch.where(hidden, noise, labels), **{key: each[chosen] for key, each in told.items()})
        F.cross_entropy(logits, labels.masked_fill(~hidden, -100) if masks_only else labels).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    transformer.eval()


def digits() -> tuple[Tensor, list[str]]:
    """Pictures `(B, 3, 16, 16)` in [0, 1], and their names."""
    loaded = load_digits()
    pictures = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
    pictures = F.interpolate(pictures, SIZE, mode="bilinear").expand(-1, 3, -1, -1)
    return pictures, [NAMES[label] for label in loaded.target]


def grid(columns: list[list[Image.Image]], zoom: int = 4) -> Image.Image:
    """Pictures in columns."""
    side = SIZE * zoom
    sheet = Image.new("RGB", (len(columns) * (side + 4), len(columns[0]) * (side + 4)), "white")
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x * (side + 4), y * (side + 4)))
    return sheet


def main(folder: Path, steps: int, code_steps: int) -> None:
    pictures, names = digits()
    vqvae = learn_codes(pictures, code_steps)
    pipeline = DiceMaskedImagePipeline(**parts_for(vqvae, CODES), noise="random", tau=0.9, guidance_scale=2.0)
    pipeline.set_progress_bar_config(disable=True)
    train, shown = (
        slice(0, 1500),
        [names.index(name, 1500) for name in ("three", "five", "seven", "nine", "one", "zero")],
    )
    learn_pictures(pipeline, pipeline.codes(pictures[train]), names[train], steps)
    targets = ["eight", "six", "two", "four", "seven", "six"]
    trace = pipeline.invert(
        pictures[shown],
        [names[row] for row in shown],
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
    )

    def edited(strength: float) -> list[Image.Image]:
        return pipeline.edit(trace, targets, lambda1=strength, generator=torch.Generator().manual_seed(1)).images

    columns = [
        pipeline.image_processor.postprocess(pictures[shown], "pil"),
        pipeline.reconstruct(trace).images,
        *[edited(strength) for strength in STRENGTHS],
    ]
    folder.mkdir(parents=True, exist_ok=True)
    grid(columns).save(folder / "digits.png")
    back = pipeline.reconstruct(trace, output_type="seq").sequences
    assert torch.equal(back, pipeline.codes(pictures[shown]))
    pipeline.save_pretrained(folder / "pipeline")
    print(
        f"{folder / 'digits.png'}: {', '.join(f'{names[row]} to {target}' for row, target in zip(shown, targets, strict=True))}"
    )
    print(
        f"columns: as it is, as it comes back, edited with lambda1 {', '.join(map(str, STRENGTHS[:-1]))}, painted anew"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo-output/edited-digits"))
    parser.add_argument("--steps", type=int, default=2000, help="of the transformer")
    parser.add_argument("--code-steps", type=int, default=300, help="of the VQ model")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.steps, arguments.code_steps)
