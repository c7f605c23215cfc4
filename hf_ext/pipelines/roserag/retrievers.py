"""Passages for questions, found by well-kept libraries: bm25s, sentence-transformers, and faiss through datasets.

Each is an optional part of the extra `rag`, and a retriever is anything with the method of `Retriever`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from hf_ext._lazy import optional_import

Passage = dict[str, Any]


class Retriever(Protocol):
    """Finds passages: anything with `search(queries, k)`, which returns the k best of each query, best first."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The k best passages of each query, best first: `{"title", "text", "score"}`, and the other fields they came with."""
        ...


def read_corpus(passages: Iterable[Mapping[str, Any]]) -> list[Passage]:
    """Passages with `text`, and `title` if there is one.

    Raises:
        ValueError: no passage, or one without a text; an `id` that occurs twice.
    """
    corpus: list[Passage] = []
    seen: dict[Any, int] = {}
    for number, passage in enumerate(passages):
        text = passage.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"passage {number}: text={text!r}; give a text, or drop the passage.")
        name = passage.get("id")
        if name is not None and seen.setdefault(name, number) != number:
            raise ValueError(f"passages {seen[name]} and {number} have the same id {name!r}; give each its own.")
        corpus.append({**passage, "title": passage.get("title") or ""})
    if not corpus:
        raise ValueError("the corpus is empty: give at least one passage.")
    return corpus


def _whole(passage: Mapping[str, Any]) -> str:
    return f"{passage['title']} {passage['text']}".strip()


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k}: ask for at least one passage.")


class BM25Retriever:
    """Lexical search by bm25s: Lucene's variant, k1 1.5, b 0.75, English stop words left out.

    Args:
        passages: the corpus, `{"title", "text"}`.
        stopwords: of `bm25s.tokenize`; None keeps all words, for other languages.

    Raises:
        ValueError: see `read_corpus`.
        ImportError: bm25s is not installed.
    """

    def __init__(self, passages: Iterable[Mapping[str, Any]], stopwords: str | list[str] | None = "en") -> None:
        self._bm25s = optional_import("bm25s", "rag")
        self.corpus = read_corpus(passages)
        self._stopwords = stopwords
        self._index = self._bm25s.BM25()
        self._index.index(self._tokens([_whole(passage) for passage in self.corpus]), show_progress=False)

    def _tokens(self, texts: list[str]) -> Any:
        return self._bm25s.tokenize(texts, stopwords=self._stopwords, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        _check_k(k)
        found, scores = self._index.retrieve(
            self._tokens(list(queries)), k=min(k, len(self.corpus)), show_progress=False
        )
        return [
            [
                {**self.corpus[int(number)], "score": float(score)}
                for number, score in zip(row, row_scores, strict=True)
                # One of 0 has no word in common.
                if score > 0
            ]
            for row, row_scores in zip(found, scores, strict=True)
        ]


class DenseRetriever:
    """Search by cosine similarity of sentence embeddings, and a cross-encoder over the best if you give one.

    Args:
        passages: the corpus, `{"title", "text"}`.
        model: a `SentenceTransformer` or its name.
        reranker: a `CrossEncoder` or its name, which reads the best `rerank_from` passages again.
        rerank_from: how many it reads.
        batch_size: of the encoder.

    Raises:
        ValueError: see `read_corpus`.
        ImportError: sentence-transformers is not installed.
    """

    def __init__(
        self,
        passages: Iterable[Mapping[str, Any]],
        model: Any = "sentence-transformers/all-MiniLM-L6-v2",
        reranker: Any = None,
        rerank_from: int = 50,
        batch_size: int = 64,
    ) -> None:
        self._library = optional_import("sentence_transformers", "rag")
        self.corpus = read_corpus(passages)
        self._encoder = self._library.SentenceTransformer(model) if isinstance(model, str) else model
        self._reranker = self._library.CrossEncoder(reranker) if isinstance(reranker, str) else reranker
        self._rerank_from, self._batch_size = rerank_from, batch_size
        texts = [_whole(passage) for passage in self.corpus]
        self._embeddings = self._encoder.encode_document(texts, batch_size=batch_size, convert_to_tensor=True)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        _check_k(k)
        asked = self._encoder.encode_query(list(queries), batch_size=self._batch_size, convert_to_tensor=True)
        wanted = max(k, self._rerank_from) if self._reranker is not None else k
        hits = self._library.util.semantic_search(asked, self._embeddings, top_k=min(wanted, len(self.corpus)))
        found = [[{**self.corpus[hit["corpus_id"]], "score": float(hit["score"])} for hit in row] for row in hits]
        return (
            found
            if self._reranker is None
            else [self._rerank(q, row)[:k] for q, row in zip(queries, found, strict=True)]
        )

    def _rerank(self, query: str, passages: list[Passage]) -> list[Passage]:
        scores = self._reranker.predict(
            [(query, _whole(passage)) for passage in passages], batch_size=self._batch_size
        )
        ranked = [{**passage, "score": float(score)} for passage, score in zip(passages, scores, strict=True)]
        return sorted(ranked, key=lambda passage: -passage["score"])


class FaissRetriever:
    """Search in the faiss index of a `datasets.Dataset`, for corpora that do not fit into memory.

    Args:
        dataset: the corpus with the columns `text`, and `title` if there is one, and an index made by `add_faiss_index`.
        index: name of the index.
        encode: texts to vectors `(queries, dimensions)`, with the model that made the index.

    Raises:
        ValueError: the dataset has no such index, or no column `text`.
    """

    def __init__(self, dataset: Any, index: str, encode: Any) -> None:
        if index not in dataset.list_indexes():
            raise ValueError(
                f"index={index!r}: the dataset has the indexes {dataset.list_indexes()}; make one with add_faiss_index(column={index!r})."
            )
        if "text" not in dataset.column_names:
            raise ValueError(
                f"the dataset has the columns {dataset.column_names}; rename the passages' one to `text`."
            )
        self._dataset, self._index, self._encode = dataset, index, encode

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        _check_k(k)
        found = self._dataset.get_nearest_examples_batch(self._index, self._encode(list(queries)), k)
        rows = []
        for scores, columns in zip(found.total_scores, found.total_examples, strict=True):
            names = [name for name in columns if name != self._index]
            passages = [
                dict(zip(names, values, strict=True)) for values in zip(*(columns[n] for n in names), strict=True)
            ]
            rows.append(
                [
                    {**p, "title": p.get("title") or "", "score": float(s)}
                    for p, s in zip(passages, scores, strict=True)
                ]
            )
        return rows
