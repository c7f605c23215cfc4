"""Texts: what their tokenizers make of them, models of several kinds, and what cannot be edited."""

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline, LLaDA2Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AddedToken,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
)

from hf_ext.pipelines.dice import DiceDiffusionGemmaPipeline, DiceDiffusionTextPipeline, DiceTextEditPipeline
from tests.pipelines.dice.kinds import KINDS, TEXTS, inverted, pipeline, seeded
from tests.pipelines.dice.models import WORDS, diffusion_gemma_parts, roberta, word_tokenizer


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """`[CLS] prompt [SEP] text [SEP]`, with token types."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    kinds = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=kinds, **names)


def bert():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    return BertForMaskedLM(BertConfig(vocab_size=5 + len(WORDS) + 3, max_position_embeddings=40, **sizes))


def modern_bert():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    ids = dict(pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    return ModernBertForMaskedLM(ModernBertConfig(vocab_size=5 + len(WORDS), **sizes, **ids))


@pytest.mark.parametrize("build", [bert, modern_bert])
@pytest.mark.parametrize("prompt", ["positive :", "", None])
def test_other_masked_models(build, prompt):
    """A vocabulary of the model that is larger than the tokenizer's is never predicted."""
    pipe = DiceTextEditPipeline(build().eval(), bert_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    trace = pipe.invert(TEXTS, prompt, generator=seeded())
    assert trace.settings.num_inference_steps == max(len(text.split()) for text in TEXTS)
    assert pipe.reconstruct(trace).texts == TEXTS
    target = None if prompt is None else "negative and so :"
    found = pipe.edit(trace, target, lambda1=0.0, generator=seeded())
    assert [len(text.split()) for text in found.texts] == [len(text.split()) for text in TEXTS]
    assert set(" ".join(found.texts).split()) <= set(WORDS)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models(bits, tmp_path):
    tokenizer = word_tokenizer()
    roberta(len(tokenizer), hidden=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["lm_head"])
    model = RobertaForMaskedLM.from_pretrained(tmp_path, quantization_config=config)
    pipe = DiceTextEditPipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    trace = pipe.invert(TEXTS, "positive :", generator=seeded())
    assert pipe.reconstruct(trace).texts == TEXTS
    assert pipe.edit(trace, "negative", lambda1=0.0, generator=seeded()).texts != TEXTS


def test_prompts_of_any_length_leave_the_text_where_it_is():
    pipe = pipeline("masked text")
    trace = inverted("masked text")
    found = {
        prompt: pipe.edit(trace, prompt, lambda1=1.0, lambda2=0.0).texts
        for prompt in ("", "positive", "negative so very long :")
    }
    assert all(len(each[0].split()) == 8 and len(each[1].split()) == 5 for each in found.values())


def test_source_prompts_by_row():
    trace = pipeline("masked text").invert(TEXTS, ["positive :", "negative :"], num_inference_steps=3)
    assert trace.notes["source_prompts"] == ["positive :", "negative :"]
    assert pipeline("masked text").reconstruct(trace).texts == TEXTS


def test_noise():
    trace = inverted("masked text", tau=1.0)
    usual = set(pipeline("masked text")._ordinary.tolist())
    assert set(trace.noise[trace.editable].tolist()) <= usual and len(set(trace.noise[0].tolist())) > 2
    assert trace.settings.carry_over is False and inverted("masked text").settings.tau == 0.9
    masks = inverted("masked text, masks")  # every token is noise in the last state, so that every one can be edited
    assert masks.settings.carry_over and masks.settings.tau == 1.0
    assert (masks.noise == masks.noise[0, 0]).all() and masks.noise[0, 0] == word_tokenizer().mask_token_id
    last = masks.state(len(masks.states) - 1)
    assert (last[masks.editable] == word_tokenizer().mask_token_id).all()
    given = torch.full_like(trace.tokens, 9)
    assert torch.equal(inverted("masked text", noise_map=given).noise, given)


def test_what_cannot_be_inverted():
    pipe = pipeline("masked text")

    def refused(match, text=TEXTS, prompt="positive :", **options):
        with pytest.raises(ValueError, match=match):
            pipe.invert(text, prompt, **options)

    refused("text 1 is empty: ''", ["good", ""])
    refused(r"text 0 has the special tokens \['<mask>'\]", "a <mask> film")
    refused("prompt and text have 64 tokens, and the model reads 40", "film " * 58)
    refused("source_prompt has 3 entries and there are 2 rows", prompt=["a", "b", "c"])
    refused("give a prompt for every row", prompt=["a", None])
    refused("noise_map is torch.float32", noise_map=torch.zeros(2, 8))
    refused(r"give torch.int64 \(2, 8\)", noise_map=torch.zeros(2, 7, dtype=torch.int64))
    refused("text is empty; give at least one", [])
    refused("negative_prompt has 3 entries", negative_prompt=["a", "b", "c"])
    refused("outside of the vocabulary", noise_map=torch.full((2, 8), 99))


def test_components_that_do_not_do():
    tokenizer = word_tokenizer()
    model = roberta(len(tokenizer))
    with pytest.raises(ValueError, match="noise='both' is unknown"):
        DiceTextEditPipeline(model, tokenizer, noise="both")
    tokenizer.mask_token = None
    for cls in (DiceTextEditPipeline, DiceDiffusionTextPipeline):
        with pytest.raises(ValueError, match="the tokenizer has no mask token"):
            cls(model, tokenizer, noise="mask")


def test_a_trace_of_another_tokenizer_is_refused():
    trace = inverted("masked text")
    other = KINDS["masked text"].pipeline()
    other.tokenizer = word_tokenizer(WORDS[::-1])
    with pytest.raises(ValueError, match="recorded with another tokenizer"):
        other.edit(trace, "positive :")


def test_special_tokens_without_a_name():
    """Those of chat templates are special, but have no role: they are neither noise nor predicted nor edited."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", special=True)])
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert turn not in tokenizer.all_special_ids
    model = roberta(len(tokenizer))
    with torch.no_grad():
        model.lm_head.bias[turn] = 1e3
    pipe = DiceTextEditPipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    trace = pipe.invert(TEXTS, "positive :", tau=1.0, generator=seeded())
    assert turn not in trace.noise
    for options in ({"lambda1": 0.0}, {"lambda1": 1.5, "lambda2": 0.5}, {"lambda1": 1.0, "lambda2": 5.0}):
        assert turn not in pipe.edit(trace, "negative", generator=seeded(), **options).sequences
    with pytest.raises(ValueError, match=r"has the special tokens \['<turn>'\]"):
        pipe.invert("good <turn> film", "positive :")


def test_strengths_above_one_leave_special_tokens_out():
    for anchor in ("onehot", "corrected"):
        trace = inverted("masked text", anchor=anchor, temperatures=(0.2, 1.2))
        found = pipeline("masked text").edit(trace, "negative", lambda1=1.5, lambda2=0.0).sequences
        assert set(found[trace.editable].tolist()) <= set(pipeline("masked text")._ordinary.tolist())


def test_a_tokenizer_with_more_tokens_than_the_model():
    tokenizer = word_tokenizer()
    model = roberta(len(tokenizer))
    tokenizer.add_tokens(["unseen"])
    pipe = DiceTextEditPipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    trace = pipe.invert("good film", "positive :")
    with pytest.raises(ValueError, match=r"the tokenizer has the token 27, and the model 27 of them"):
        pipe.reconstruct(trace)


def test_positions_of_roberta_begin_behind_padding():
    tokenizer = word_tokenizer(length=10**9)
    pipe = DiceTextEditPipeline(roberta(len(tokenizer)), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    longest = " ".join(["film"] * 37)
    assert pipe.reconstruct(pipe.invert(longest, "so", num_inference_steps=2)).texts == [longest]
    with pytest.raises(ValueError, match="have 43 tokens, and the model reads 42"):
        pipe.invert(longest + " film", "so")


def test_logits_of_minus_infinity():
    """Some models rule out values themselves."""
    tokenizer = word_tokenizer()
    model = roberta(len(tokenizer))
    with torch.no_grad():
        model.lm_head.bias[9] = -torch.inf
    pipe = DiceTextEditPipeline(model, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    trace = pipe.invert(TEXTS, "positive :", generator=seeded())
    assert pipe.reconstruct(trace).texts == TEXTS
    found = pipe.edit(trace, "negative", lambda1=0.3, generator=seeded()).sequences
    assert len(set(found[trace.editable].tolist())) > 3


def test_guidance_of_texts():
    """Negative prompts are one for all texts, or one for each."""
    options = dict(guidance_scale=2.0, anchor="corrected", store_residuals=True)
    one, each, other = (
        inverted("masked text", negative_prompt=prompt, **options).residuals
        for prompt in ("bad", ["bad", "bad"], "so very long :")
    )
    assert torch.equal(one, each) and not torch.allclose(one, other)


# -- diffusion language models -------------------------------------------------------------------------------------------------


def test_causal_models_are_refused():
    tokenizer = word_tokenizer()
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    with pytest.raises(ValueError, match="LlamaForCausalLM is causal"):
        DiceDiffusionTextPipeline(model, tokenizer).invert(TEXTS, "positive")


def test_one_step_predicts_everything():
    """With one state, and with a text of one token, all of it is masked."""
    pipe = pipeline("diffusion text")
    for text, options in (("good", {}), (TEXTS[0], {"num_inference_steps": 1})):
        trace = pipe.invert(text, "positive", generator=seeded(1), **options)
        assert len(trace.states) == 1 and trace.changed(0).all()
        assert pipe.reconstruct(trace).texts == [text]
        assert pipe.edit(trace, "negative", lambda1=0.0, generator=seeded(1)).texts != [text]


def test_the_anchor_is_chosen_by_row():
    """A model that repeats the first text, and not the second, has the published anchor for the first."""
    pipe = KINDS["diffusion text"].pipeline()
    word = pipe.tokenizer.convert_tokens_to_ids("good")
    with torch.no_grad():
        pipe.model.lm_head.bias[word] = 1e3
    trace = pipe.invert(["good good", "bad bad"], "positive", num_inference_steps=3)
    assert trace.onehot.tolist() == [False, True]
    assert pipe.reconstruct(trace).texts == ["good good", "bad bad"]


def test_parts_of_first_party_pipelines():
    parts = KINDS["diffusion text"].parts()
    first = LLaDA2Pipeline(**parts, scheduler=BlockRefinementScheduler())
    own = DiceDiffusionTextPipeline.from_pipe(first, tokenizer=first.tokenizer)
    assert own.model is first.model and own.tokenizer is first.tokenizer
    gemma = DiffusionGemmaPipeline(**diffusion_gemma_parts(), scheduler=BlockRefinementScheduler())
    assert DiceDiffusionGemmaPipeline.from_pipe(gemma).processor is gemma.processor


def test_chat_templates_stand_around_the_prompt():
    pipe = KINDS["diffusion text"].pipeline()
    plain = pipe.invert(TEXTS, "positive", num_inference_steps=2).source["input_ids"]
    pipe.tokenizer.chat_template = "so {{ messages[0]['content'] }} {% if add_generation_prompt %}:{% endif %}"
    trace = pipe.invert(TEXTS, "positive", num_inference_steps=2)
    words = pipe.tokenizer.convert_ids_to_tokens(trace.source["input_ids"][0])
    assert words.index("so") < words.index("positive") < words.index(":")
    assert not torch.equal(plain, trace.source["input_ids"])
    assert pipe.reconstruct(trace).texts == TEXTS


@torch.no_grad()
def test_canvases_see_what_the_ones_before_became():
    """The second canvas of an edit is predicted under the edited first one; the trace's is under the recorded one."""
    pipe, prompts = pipeline("DiffusionGemma"), KINDS["DiffusionGemma"].prompts
    trace = pipe.invert(TEXTS[0], prompts[0], num_inference_steps=3, tau=1.0, generator=seeded(1))
    assert trace.tokens.shape == (1, 8)
    edited = pipe.edit(trace, prompts[1], lambda1=0.0, lambda2=0.0).sequences
    told = pipe._conditions(trace, [prompts[1]])
    last = pipe._canvas(trace, slice(4, 8))
    expected = last.state(2)
    for number in reversed(range(3)):
        logits = pipe._denoise(trace, expected, pipe._read(told, edited[:, :4]), 0.0)
        expected = logits.argmax(-1)
        if number:
            expected = last.noised(expected, number - 1)
    assert torch.equal(edited[:, 4:], expected)


def test_prompts_of_different_lengths_in_gemma():
    """A row of a batch is what it is alone, whatever side the tokenizer pads on."""
    pipe = KINDS["DiffusionGemma"].pipeline()
    pipe.processor.padding_side = "right"
    prompts = ["positive", "negative so very long and"]
    options = dict(num_inference_steps=3, tau=1.0)
    together = pipe.edit(
        pipe.invert(TEXTS, prompts, generator=seeded(), **options), prompts[::-1], lambda1=0.0, generator=seeded()
    ).texts
    for row in range(2):
        trace = pipe.invert(TEXTS[row], prompts[row], generator=seeded(1, row), **options)
        assert pipe.edit(trace, prompts[1 - row], lambda1=0.0, generator=seeded(1, row)).texts == [together[row]]


def test_a_callback_holds_for_the_canvases_that_follow():
    pipe, seen = pipeline("DiffusionGemma"), []

    def change(own, step, time, given):
        seen.append(own._lambda1)
        if step == 0:
            own._lambda1 = 0.25
        return {}

    trace = inverted("DiffusionGemma")
    pipe.edit(trace, "negative", lambda1=0.5, callback_on_step_end=change, generator=seeded())
    assert seen == [0.5] + [0.25] * 9


def test_gemma_wants_a_prompt():
    with pytest.raises(ValueError, match="give one, be it empty"):
        pipeline("DiffusionGemma").invert(TEXTS)


def test_slow_tokenizers_are_refused():
    tokenizer = ByT5Tokenizer(mask_token="<mask>")
    with pytest.raises(ValueError, match="ByT5Tokenizer is slow and cannot say where the text begins"):
        DiceTextEditPipeline(roberta(len(tokenizer)), tokenizer)
