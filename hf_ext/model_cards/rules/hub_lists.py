"""Values that the Hub accepts in card metadata: closed lists of the server, as of huggingface.js commit fe42e68."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


LICENSES = frozenset(
    _words(
        """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1
ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
    )
)

PIPELINE_TAGS = frozenset(
    _words(
        """
text-classification token-classification table-question-answering question-answering zero-shot-classification
translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech
text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
voice-activity-detection depth-estimation image-classification object-detection image-segmentation
text-to-image image-to-text image-to-image image-to-video unconditional-image-generation video-classification
reinforcement-learning robotics tabular-classification tabular-regression tabular-to-text table-to-text
multiple-choice text-ranking text-retrieval time-series-forecasting text-to-video image-text-to-text
image-text-to-image image-text-to-video visual-question-answering document-question-answering
zero-shot-image-classification graph-ml mask-generation zero-shot-object-detection text-to-3d image-to-3d
image-feature-extraction video-text-to-text keypoint-detection visual-document-retrieval any-to-any
video-to-video other
"""
    )
)

BASE_MODEL_RELATIONS = frozenset({"adapter", "finetune", "merge", "quantized"})

# ISO 639-1.
LANGUAGES = frozenset(
    _words(
        """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw
ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
    )
)

# The libraries that most models name; the Hub takes any other word as well, but counts no downloads for it.
LIBRARIES = frozenset(
    _words(
        """
adapter-transformers allennlp asteroid bertopic bm25s cartesia_pytorch chronos-forecasting colpali cosmos
depth-anything-v2 diffusers diffusionkit espnet fairseq fastai fasttext flair gliner gguf hunyuan3d-2 keras keras-hub
kernels lerobot litert-lm llama.cpp luxtts mamba-ssm mlx mlx-image mlx-lm mlx-vlm model2vec nemo onnx open_clip
openvino paddlenlp paddleocr peft perception-encoder pyannote-audio pylate pyterrier pythae pytorch rag relik
sam2 sample-factory saelens sentence-transformers setfit sklearn spacy speechbrain stable-baselines3 stanza
swarmformer tensorflowtts terratorch tf-keras timesfm timm transformers transformers.js trl ultralytics
unity-sentis vllm voicecraft whisperkit yolov10
"""
    )
)
