"""Small models with random weights, whose pipelines are the real ones."""

import string

import torch
from diffusers import AmusedScheduler, Transformer2DModel, UVit2DModel, VQDiffusionScheduler, VQModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    Gemma4VisionConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = [
    *("the", "a", "film", "movie", "meal", "was", "is", "so", "very", "good", "bad", "great", "awful"),
    *("and", "but", "long", "short", ".", ",", ":", "positive", "negative"),
]


def word_tokenizer(words: list[str] = WORDS, length: int = 40) -> PreTrainedTokenizerFast:
    """A word for a token, pairs as RoBERTa has them."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", mask_token="<mask>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", model_max_length=length, **names
    )


def roberta(vocabulary: int, hidden: int = 32, layers: int = 2, seed: int = 0) -> RobertaForMaskedLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=2 * hidden)
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    config = RobertaConfig(vocab_size=vocabulary, max_position_embeddings=44, **sizes, **ids)
    model = RobertaForMaskedLM(config).eval()
    # Weights of the usual start make logits that hardly differ.
    with torch.no_grad():
        model.lm_head.bias.normal_()
        model.roberta.embeddings.word_embeddings.weight.normal_()
    return model


def letter_tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    """A letter for a token, as CLIP's tokenizer pads and ends them."""
    vocabulary = {each: number for number, each in enumerate([*string.ascii_lowercase, " ", "<|end|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(pad_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def text_encoder(cls: type, width: int = 16, length: int = 8):
    ids = dict(bos_token_id=27, eos_token_id=27, pad_token_id=27)
    sizes = dict(hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return cls(
        CLIPTextConfig(vocab_size=28, projection_dim=width, max_position_embeddings=length, **sizes, **ids)
    ).eval()


def vq_model(codes: int = 16, **options) -> VQModel:
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(8, 8), latent_channels=8, num_vq_embeddings=codes, norm_num_groups=8)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return VQModel(**sizes, **blocks, sample_size=16, **options).eval()


def amused_parts(codes: int = 16, hidden: int = 32, layers: int = 2) -> dict:
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, in_channels=32, block_out_channels=32)
    conditions = dict(cond_embed_dim=16, encoder_hidden_size=16, micro_cond_encode_dim=8, micro_cond_embed_dim=40)
    heads = dict(num_attention_heads=2, block_num_heads=2, num_hidden_layers=layers, num_res_blocks=1, sample_size=8)
    transformer = UVit2DModel(vocab_size=codes + 1, codebook_size=codes, **sizes, **conditions, **heads).eval()
    return dict(
        vqvae=vq_model(codes, lookup_from_codebook=True),
        tokenizer=letter_tokenizer(),
        text_encoder=text_encoder(CLIPTextModelWithProjection),
        transformer=transformer,
        scheduler=AmusedScheduler(mask_token_id=codes),
    )


def vq_diffusion_parts(codes: int = 16, steps: int = 12) -> dict:
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, norm_num_groups=8, sample_size=8)
    norms = dict(activation_fn="geglu-approximate", num_embeds_ada_norm=steps, norm_type="ada_norm")
    transformer = Transformer2DModel(
        num_vector_embeds=codes + 1, cross_attention_dim=16, attention_bias=True, **sizes, **norms
    ).eval()
    return dict(
        vqvae=vq_model(codes),
        tokenizer=letter_tokenizer(),
        text_encoder=text_encoder(CLIPTextModel),
        transformer=transformer,
        scheduler=VQDiffusionScheduler(num_vec_classes=codes + 1, num_train_timesteps=steps),
    )


CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}:{% endif %}"


def diffusion_gemma_parts(words: list[str] = WORDS, canvas: int = 4) -> dict:
    tokenizer = word_tokenizer(words)
    tokenizer.chat_template, tokenizer.padding_side = CHAT, "left"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, moe_intermediate_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, global_head_dim=16)
    experts = dict(num_experts=2, top_k_experts=1)
    layers = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    text = dict(vocab_size=len(tokenizer), **sizes, **heads, **experts, **layers, **ids)
    sight = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision = Gemma4VisionConfig(**sight, num_key_value_heads=2, head_dim=8)
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision.to_dict(), canvas_length=canvas)
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return dict(model=model, processor=tokenizer)
