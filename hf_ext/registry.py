"""The one list of methods.

Everything that speaks about methods reads it from here: the table in README.md, the index of docs/methods, the sections of
a model card, `hf-ext methods`, the public names of the package and the tests that keep these in agreement. The module is
plain data: it imports nothing, so reading it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        slug: lower-case identifier; also the Hub tag, the docs page and the folder name.
        name: the name as the authors write it.
        kind: where it plugs in: `"PEFT type"`, `"LoRA posterior"`, `"TRL trainer"`, `"cache"` or `"pipeline"`.
        summary: one sentence for tables and cards: what it does for the user.
        paper_title: title of the paper.
        arxiv: arXiv id, e.g. `"2406.10777"`.
        citation: BibTeX entry.
        entry_points: public names and the modules that define them, first the one a user starts with.
        changes: one sentence for the model card: what the method does to a model's weights or behaviour.
        limits: known limits, one sentence each; they are printed in every card.
        peft_type: the `PeftType` member, for PEFT types.
        lora_export: the function that writes an adapter of this type as LoRA, if there is one.
    """

    slug: str
    name: str
    kind: str
    summary: str
    paper_title: str
    arxiv: str
    citation: str
    entry_points: dict[str, str]
    changes: str
    limits: tuple[str, ...]
    peft_type: str | None = None
    lora_export: str | None = None

    @property
    def paper_url(self) -> str:
        return f"https://huggingface.co/papers/{self.arxiv}"

    @property
    def docs_page(self) -> str:
        return f"docs/methods/{self.slug}.md"


ROSELORA = Method(
    slug="roselora",
    name="RoseLoRA",
    kind="PEFT type",
    summary="LoRA whose update stays row- and column-sparse: it changes a few per cent of a weight's entries, and can be applied and taken back as a patch",
    paper_title=(
        "RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model "
        "for Knowledge Editing and Fine-tuning"
    ),
    arxiv="2406.10777",
    citation="""@inproceedings{wang2024roselora,
  title     = {RoseLoRA: Row and Column-wise Sparse Low-rank Adaptation of Pre-trained Language Model for Knowledge Editing and Fine-tuning},
  author    = {Wang, Haoyu and Liu, Tianci and Li, Ruirui and Cheng, Monica and Zhao, Tuo and Gao, Jing},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  pages     = {996--1008},
  year      = {2024},
}""",
    entry_points={
        "RoseLoraConfig": "hf_ext.tuners.roselora",
        "RoseLoraModel": "hf_ext.tuners.roselora",
        "RoseLoraCallback": "hf_ext.tuners.roselora",
    },
    changes=(
        "During training every row of `lora_A` and every column of `lora_B` is pruned to a small share of its entries, "
        "so that the merged update touches only a few entries of each adapted weight."
    ),
    limits=(
        "The target sparsity matters most and should be tuned for every task.",
        "A very sparse update has little capacity: hundreds of unrelated edits do not fit into one adapter.",
        "The method was not designed for long sequences of edits applied one after another.",
    ),
    peft_type="ROSELORA",
    lora_export="hf_ext.tuners.roselora.save_as_lora",
)

OVERTONE = Method(
    slug="overtone",
    name="OVERTONE",
    kind="TRL trainer",
    summary="a token loss that stops pushing answer tokens which are already learnt: less damage around an edited fact",
    paper_title="Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing",
    arxiv="2502.00602",
    citation="""@inproceedings{liu2025overtone,
  title     = {Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing},
  author    = {Liu, Tianci and Li, Ruirui and Dong, Zihan and Liu, Hui and Tang, Xianfeng and Yin, Qingyu and Zhang, Linjun and Wang, Haoyu and Gao, Jing},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
}""",
    entry_points={
        "OvertoneTrainer": "hf_ext.trainers.overtone",
        "OvertoneConfig": "hf_ext.trainers.overtone",
        "OvertoneLoss": "hf_ext.trainers.overtone",
        "OvertoneMixin": "hf_ext.trainers.overtone",
        "OvertoneSaturationCallback": "hf_ext.trainers.overtone",
    },
    changes=(
        "The one-hot target of each answer token is mixed with the model's own filtered prediction, and a token whose "
        "divergence from that target is small enough contributes no gradient."
    ),
    limits=(
        "It changes the loss only: how far an edit reaches still depends on what is trained.",
        "Multi-hop reasoning over an edited fact is not guaranteed and should be measured.",
    ),
)

SQUAT = Method(
    slug="squat",
    name="SQuat",
    kind="cache",
    summary="a key-value cache in 2 to 8 bits for `generate`, rounded so that the prompt's queries notice least",
    paper_title="SQuat: Subspace-orthogonal KV Cache Quantization",
    arxiv="2503.24358",
    citation="""@inproceedings{wang2025squat,
  title     = {SQuat: Subspace-orthogonal KV Cache Quantization},
  author    = {Wang, Hao and Han, Ligong and Xu, Kai and Srivastava, Akash},
  booktitle = {Second Conference on Language Modeling},
  year      = {2025},
}""",
    entry_points={
        "SQuatCache": "hf_ext.cache.squat",
        "SQuatCacheConfig": "hf_ext.cache.squat",
        "squat_attention": "hf_ext.cache.squat",
    },
    changes="Nothing in the weights: keys and values of past tokens are stored in few bits while text is generated.",
    limits=(
        "Two bits cost quality that a task may notice; measure it, or use three.",
        "Layers with sliding windows, linear attention or multi-head latent attention are not packed.",
    ),
)

FLAT = Method(
    slug="flat",
    name="FLAT",
    kind="TRL trainer",
    summary="makes a model prefer a refusal to the answers it is to forget, without retain data or a second model",
    paper_title="LLM Unlearning via Loss Adjustment with Only Forget Data",
    arxiv="2410.11143",
    citation="""@inproceedings{wang2025llm,
  title     = {LLM Unlearning via Loss Adjustment with Only Forget Data},
  author    = {Wang, Yaxuan and Wei, Jiaheng and Liu, Chris Yuhao and Pang, Jinlong and Liu, Quan and Shah, Ankit Parag and Bao, Yujia and Liu, Yang and Wei, Wei},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
}""",
    entry_points={
        "FlatTrainer": "hf_ext.trainers.flat",
        "FlatConfig": "hf_ext.trainers.flat",
        "UnlearnTrainer": "hf_ext.trainers.flat",
        "UnlearnConfig": "hf_ext.trainers.flat",
        "evaluate_unlearning": "hf_ext.metrics.unlearning",
    },
    changes=(
        "The weights were trained to make a refusal more probable and the answers to forget less probable, each with a "
        "bounded weight."
    ),
    limits=(
        "An adapter can be switched off, and the memory is back: publish the merged weights.",
        "Fine-tuning on related data, or rounding to fewer bits, can bring forgotten knowledge back: measure both.",
        "Without retain data a refusal spreads to neighbouring questions.",
        "Forgetting is not a proof of deletion: it is as good as the measurements, and traces they miss may remain.",
    ),
)

ADAPTIVE_SVD = Method(
    slug="adaptive_svd",
    name="Adaptive SVD",
    kind="TRL trainer",
    summary="full fine-tuning on one task after another, each inside what the weights' large singular directions leave free",
    paper_title="Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
    arxiv="2504.07097",
    citation="""@inproceedings{nayak2026sculpting,
  title     = {Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning},
  author    = {Nayak, Nikhil Shivakumar and Killamsetty, Krishnateja and Han, Ligong and Bhandwaldar, Abhishek and Chanda, Prateek and Xu, Kai and Wang, Hao and Pareja, Aldo and Silkin, Oleg and Eyceoz, Mustafa and Srivastava, Akash},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
}""",
    entry_points={
        "AdaptiveSVDTrainer": "hf_ext.trainers.adaptive_svd",
        "AdaptiveSVDConfig": "hf_ext.trainers.adaptive_svd",
        "ContinualTask": "hf_ext.trainers.adaptive_svd",
        "SubspaceAdamW": "hf_ext.trainers.adaptive_svd",
        "TaskSequenceTrainer": "hf_ext.trainers.task_sequence",
        "TaskMatrix": "hf_ext.metrics.continual",
    },
    changes=(
        "The weights were trained in full, those of linear layers inside the orthogonal complement of their largest singular "
        "directions."
    ),
    limits=(
        "Forgetting is reduced, not prevented: embeddings, norms and the output layer are not protected, and neither is what "
        "lies in small singular directions.",
        "What is free shrinks with the share that is protected, so a task may be learnt less well than by plain fine-tuning.",
        "Where a few rows of earlier tasks may be kept, training on them as well protects as much, more simply.",
    ),
)

ROSERAG = Method(
    slug="roserag",
    name="RoseRAG",
    kind="TRL trainer",
    summary="teaches a small model to answer from retrieved passages when some of them mislead, from pairs that it wrote itself",
    paper_title=(
        "RoseRAG: Robust Retrieval-augmented Generation with Small-scale LLMs via Margin-aware Preference Optimization"
    ),
    arxiv="2502.10993",
    citation="""@inproceedings{liu2025roserag,
  title     = {RoseRAG: Robust Retrieval-augmented Generation with Small-scale LLMs via Margin-aware Preference Optimization},
  author    = {Liu, Tianci and Jiang, Haoxiang and Wang, Tianze and Xu, Ran and Yu, Yue and Zhang, Linjun and Zhao, Tuo and Wang, Haoyu},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
  pages     = {13036--13054},
  year      = {2025},
}""",
    entry_points={
        "RoseRAGTrainer": "hf_ext.trainers.roserag",
        "RoseRAGConfig": "hf_ext.trainers.roserag",
        "RoseRAGDatasetBuilder": "hf_ext.trainers.roserag",
        "TransformersBackend": "hf_ext.trainers.roserag",
        "EndpointBackend": "hf_ext.trainers.roserag",
        "RagPipeline": "hf_ext.pipelines.roserag",
        "RagPrompts": "hf_ext.pipelines.roserag",
        "BM25Retriever": "hf_ext.pipelines.roserag",
        "DenseRetriever": "hf_ext.pipelines.roserag",
    },
    changes=(
        "The model was trained to prefer its least confident right answers over its most confident wrong ones to the same question and "
        "passages."
    ),
    limits=(
        "It answers from the passages it is given: what they get wrong, it may repeat.",
        "Ask it with the prompt it was trained on, which lies beside the model as `rag_config.json`.",
        "A citation names a passage that the rationale speaks of; that the passage supports it is not checked.",
    ),
)

NEAT = Method(
    slug="neat",
    name="NEAT",
    kind="PEFT type",
    summary="an update that a small network computes from the frozen weight itself: nonlinear in the weight, for somewhat more than LoRA takes in training and the same in use",
    paper_title="NEAT: Nonlinear Parameter-efficient Adaptation of Pre-trained Models",
    arxiv="2410.01870",
    citation="""@misc{zhong2024neat,
  title         = {NEAT: Nonlinear Parameter-efficient Adaptation of Pre-trained Models},
  author        = {Zhong, Yibo and Jiang, Haoxiang and Li, Lincan and Nakada, Ryumei and Liu, Tianci and Zhang, Linjun and Yao, Huaxiu and Wang, Haoyu},
  year          = {2024},
  eprint        = {2410.01870},
  archivePrefix = {arXiv},
}""",
    entry_points={
        "NeatConfig": "hf_ext.tuners.neat",
        "NeatModel": "hf_ext.tuners.neat",
        "accelerate_peanut": "hf_ext.tuners.neat",
    },
    changes="Each adapted weight is changed by a matrix of rank at most `r` that a small network computed from the weight itself.",
    limits=(
        "The update depends on the base weights: on another precision, quantisation or revision of the base it is another update.",
        "Its updates are among those that LoRA of the same rank can express; what differs is how they are reached.",
    ),
    peft_type="NEAT",
    lora_export="hf_ext.tuners.neat.save_as_lora",
)

BAFT = Method(
    slug="baft",
    name="BaFT",
    kind="PEFT type",
    summary="knowledge editing in the hidden states: at a few tokens they are moved inside a learnt subspace, each direction as far as the input asks for",
    paper_title="Unlocking Efficient, Scalable, and Continual Knowledge Editing with Basis-Level Representation Fine-Tuning",
    arxiv="2503.00306",
    citation="""@inproceedings{liu2025baft,
  title     = {Unlocking Efficient, Scalable, and Continual Knowledge Editing with Basis-Level Representation Fine-Tuning},
  author    = {Liu, Tianci and Li, Ruirui and Qi, Yunzhe and Liu, Hui and Tang, Xianfeng and Zheng, Tianqi and Yin, Qingyu and Cheng, Monica Xiao and Huan, Jun and Wang, Haoyu and Gao, Jing},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  eprint    = {2503.00306},
  archivePrefix = {arXiv},
}""",
    entry_points={
        "BaftConfig": "hf_ext.tuners.baft",
        "BaftModel": "hf_ext.tuners.baft",
        "BaftTrainer": "hf_ext.trainers.baft",
        "BaftTrainerConfig": "hf_ext.trainers.baft",
    },
    changes="No weight is changed: at chosen tokens, the hidden states after the edited blocks are moved inside a subspace of `r` directions, each as far as a gate lets it.",
    limits=(
        "It cannot be merged into the weights, so that it is used with this package.",
        "It acts at the tokens that `positions` names, which follow from where a prompt ends: score a prompt and an answer together with `labels` or `prompt_mask`.",
    ),
    peft_type="BAFT",
)

TFB = Method(
    slug="tfb",
    name="TFB",
    kind="LoRA posterior",
    summary="turns a finished LoRA adapter into a distribution over adapters, without training: several draws, and how far their answers agree",
    paper_title="Training-Free Bayesianization for Low-Rank Adapters of Large Language Models",
    arxiv="2412.05723",
    citation="""@inproceedings{shi2025trainingfree,
  title     = {Training-Free Bayesianization for Low-Rank Adapters of Large Language Models},
  author    = {Shi, Haizhou and Wang, Yibin and Han, Ligong and Zhang, Huan and Wang, Hao},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
}""",
    entry_points={
        "bayesianize": "hf_ext.tuners.tfb",
        "load_bayesian": "hf_ext.tuners.tfb",
        "generate_with_uncertainty": "hf_ext.tuners.tfb",
        "BayesianLoraConfig": "hf_ext.tuners.tfb",
    },
    changes="Nothing in the weights: the size of the noise with which the adapter can be drawn is stored in its configuration.",
    limits=(
        "Without this package the adapter is what it was without noise.",
        "The size of the noise was fitted to one kind of inputs; for others, fit it again.",
        "Draws vary around one adapter: several adapters that were trained apart disagree about more.",
    ),
)

LORVP = Method(
    slug="lorvp",
    name="LoR-VP",
    kind="PEFT type",
    summary="adapts a frozen image model by one learnt picture of low rank that is added to every input: a few thousand numbers, no cost when it is used",
    paper_title="LoR-VP: Low-Rank Visual Prompting for Efficient Vision Model Adaptation",
    arxiv="2502.00896",
    citation="""@inproceedings{jin2025lorvp,
  title     = {LoR-VP: Low-Rank Visual Prompting for Efficient Vision Model Adaptation},
  author    = {Jin, Can and Li, Ying and Zhao, Mingyu and Zhao, Shiyu and Wang, Zhenting and He, Xiaoxiao and Han, Ligong and Che, Tong and Metaxas, Dimitris N.},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
}""",
    entry_points={
        "LorVpConfig": "hf_ext.tuners.lorvp",
        "LorVpModel": "hf_ext.tuners.lorvp",
        "LabelMappingCallback": "hf_ext.tuners.lorvp",
        "fit_label_map": "hf_ext.tuners.lorvp",
    },
    changes="No weight is changed: one picture, the same for all inputs, is added to the pixels, and a classifier of the new task is trained with it.",
    limits=(
        "A prompt is learnt for pictures of one size, as one image processor prepares them.",
        "It adds a constant to what the first layer puts out: what a model cannot tell apart, it will not tell apart with a prompt either.",
    ),
    peft_type="LORVP",
)

DICE = Method(
    slug="dice",
    name="DICE",
    kind="pipeline",
    summary="edits a text or a picture with a new prompt and keeps the rest, for masked models and discrete diffusion: no training, no mask, and full strength gives the input back exactly",
    paper_title="DICE: Discrete Inversion Enabling Controllable Editing for Masked Generative Models",
    arxiv="2410.08207",
    citation="""@inproceedings{he2026dice,
  title     = {DICE: Discrete Inversion Enabling Controllable Editing for Masked Generative Models},
  author    = {He, Xiaoxiao and Dao, Quan and Han, Ligong and others},
  booktitle = {IEEE/CVF Winter Conference on Applications of Computer Vision},
  year      = {2026},
  eprint    = {2410.08207},
  archivePrefix = {arXiv},
}""",
    entry_points={
        "DiceTextEditPipeline": "hf_ext.pipelines.dice",
        "DiceDiffusionTextPipeline": "hf_ext.pipelines.dice",
        "DiceDiffusionGemmaPipeline": "hf_ext.pipelines.dice",
        "DiceMaskedImagePipeline": "hf_ext.pipelines.dice",
        "DiceVQDiffusionPipeline": "hf_ext.pipelines.dice",
        "DiceSettings": "hf_ext.pipelines.dice",
        "DiceTrace": "hf_ext.pipelines.dice",
    },
    changes="Nothing in the weights: what the model would have had to predict differently to write the input is added to its predictions under a new prompt.",
    limits=(
        "Tokens are replaced where they stand: a text keeps its number of tokens, a picture its size.",
        "An edit is as good as the model's own answer to the prompt, and how strong it should be depends on the model.",
    ),
)

METHODS: tuple[Method, ...] = (ROSELORA, OVERTONE, SQUAT, FLAT, ADAPTIVE_SVD, ROSERAG, NEAT, BAFT, TFB, LORVP, DICE)


class Paper(NamedTuple):
    """Where a loss was published: arXiv id, title and, if there is one, the BibTeX entry."""

    id: str
    title: str
    citation: str | None = None


class Loss(NamedTuple):
    """A loss of `UnlearnTrainer`: its name as the authors write it, and what a model card refers to."""

    name: str
    paper: Paper


_TOFU = Paper("2401.06121", "TOFU: A Task of Fictitious Unlearning for LLMs")
_UNDIAL = "UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models"

UNLEARNING_LOSSES: dict[str, Loss] = {
    "flat": Loss(FLAT.name, Paper(FLAT.arxiv, FLAT.paper_title, FLAT.citation)),
    "gradient_ascent": Loss("gradient ascent", _TOFU),
    "gradient_difference": Loss("gradient difference", _TOFU),
    "npo": Loss(
        "NPO",
        Paper("2404.05868", "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning"),
    ),
    "simnpo": Loss(
        "SimNPO",
        Paper("2410.07163", "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning"),
    ),
    "idk_dpo": Loss("DPO with refusals", _TOFU),
    "wga": Loss(
        "WGA", Paper("2502.19301", "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond")
    ),
    "satimp": Loss("SatImp", Paper("2505.11953", "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning")),
    "undial": Loss("UNDIAL", Paper("2402.10052", _UNDIAL)),
    "ceu": Loss("CE-U", Paper("2503.01224", "CE-U: Cross Entropy Unlearning")),
    "rmu": Loss(
        "RMU", Paper("2403.03218", "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning")
    ),
}


def method(slug: str) -> Method:
    """The method called `slug`; raises `KeyError` listing the known ones."""
    for candidate in METHODS:
        if candidate.slug == slug:
            return candidate
    raise KeyError(f"unknown method {slug!r}; known: {', '.join(m.slug for m in METHODS)}")


def public_names() -> dict[str, str]:
    """Public names of all methods with the modules that define them."""
    return {name: module for entry in METHODS for name, module in entry.entry_points.items()}
