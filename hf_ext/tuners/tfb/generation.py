"""Text from an adapter, and how sure its posterior is of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from hf_ext.tuners.tfb.posterior import posterior
from hf_ext.tuners.tfb.predict import Predictive


@dataclass(frozen=True)
class Generated:
    """Continuations and what the draws say about them. Shapes: B rows, T new tokens; 0 after the end of a row. Entropies are in nats.

    Attributes:
        sequences: `(B, prompt + T)`, as `generate` returns them.
        mask: `(B, T)`, which of the new tokens belong to the row; its end token does.
        log_probs: `(B, T)`, logarithm of the mean probability of each token.
        entropy, expected_entropy: `(B, T)`, see [`Predictive`].
        token_agreement: `(B, T)`, share of draws that would have chosen the token.
        agreement: `(B,)`, share of draws that would have chosen every token, and so have written the same by themselves.
    """

    sequences: Tensor
    mask: Tensor
    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    token_agreement: Tensor
    agreement: Tensor

    @property
    def mutual_information(self) -> Tensor:
        """`(B, T)`: what the draws disagree about."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    def per_sequence(self) -> dict[str, Tensor]:
        """`(B,)` each, mean per token: `log_prob`, `entropy`, `mutual_information`; and `agreement`."""
        tokens = self.mask.sum(1).clamp(min=1)
        means = {"log_prob": self.log_probs, "entropy": self.entropy, "mutual_information": self.mutual_information}
        return {name: values.sum(1) / tokens for name, values in means.items()} | {"agreement": self.agreement}


@torch.no_grad()
def generate_with_uncertainty(
    model: PeftModel,
    inputs: Mapping[str, Tensor],
    n_samples: int = 10,
    *,
    seed: int = 0,
    adapter_name: str | None = None,
    sigma: float | None = None,
    targets: str | None = None,
    **generate: Any,
) -> Generated:
    """Let the adapter write as always, and read what it wrote with `n_samples` draws of it, each of which sees one forward pass per row.

    Args:
        model: a decoder in eval mode with a posterior; see [`posterior`], also for `seed`, `adapter_name`, `sigma` and `targets`.
        inputs: `input_ids` and, for prompts of several lengths, `attention_mask`; padded on the left.
        generate: for `model.generate`, such as `max_new_tokens`.

    Raises:
        ValueError: see [`posterior`]; or several sequences per prompt, outputs as a dictionary, or an encoder-decoder.
    """
    for name in ("num_return_sequences", "return_dict_in_generate"):
        if int(generate.get(name) or 0) > 1 - (name == "return_dict_in_generate"):
            raise ValueError(f"{name}={generate[name]!r}: one sequence is generated for each prompt, as a tensor.")
    if model.config.is_encoder_decoder:
        raise ValueError("the model is an encoder-decoder; generate_with_uncertainty is for decoders.")
    prompts = inputs["input_ids"]
    seen = inputs.get("attention_mask", torch.ones_like(prompts)).bool()
    if not seen[:, -1].all():
        raise ValueError("attention_mask: a prompt ends in padding; pad on the left.")
    with posterior(model, 1, adapter_name=adapter_name, sigma=0.0):
        sequences = model.generate(**inputs, **generate)
    new = sequences[:, prompts.shape[1] :]
    mask = _until_end(new, _ends(model, generate))
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("log_probs", "entropy", "expected_entropy", "token_agreement")
    }
    agreement = []
    with posterior(model, n_samples, seed=seed, adapter_name=adapter_name, sigma=sigma, targets=targets) as opened:
        # Row by row, since logits are the largest thing there is.
        for row, prompt in enumerate(prompts):
            tokens = new[row][mask[row]]
            ids = torch.cat([prompt[seen[row]], tokens])[None]
            logits = model(input_ids=opened.expand(ids), logits_to_keep=len(tokens) + 1).logits[:, :-1]
            drawn = Predictive(logits.to(torch.promote_types(logits.dtype, torch.float32)))
            same = drawn.logits.argmax(-1) == tokens
            agreement.append(same.all(1).float().mean())
            parts = {
                "log_probs": drawn.log_mean_probs.gather(-1, tokens[:, None])[:, 0],
                "entropy": drawn.entropy,
                "expected_entropy": drawn.expected_entropy,
                "token_agreement": same.float().mean(0),
            }
            for name, values in parts.items():
                found[name].append(torch.nn.functional.pad(values, (0, new.shape[1] - len(tokens))))
    return Generated(
        sequences, mask, agreement=torch.stack(agreement), **{name: torch.stack(rows) for name, rows in found.items()}
    )


def _ends(model: PeftModel, generate: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end a text."""
    config = generate.get("generation_config") or model.generation_config
    ends = generate.get("eos_token_id", config.eos_token_id)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _until_end(new: Tensor, ends: list[int]) -> Tensor:
    """Which tokens come no later than the first end."""
    end = torch.isin(new, new.new_tensor(ends))
    return (end.cumsum(1) - end.long()) == 0
