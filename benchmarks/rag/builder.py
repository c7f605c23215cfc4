"""What the builder itself costs: memory and questions per second with a writer that takes no time, and 10,000 questions.

python -m benchmarks.rag.builder
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from benchmarks.common import markdown, write
from hf_ext.trainers.roserag import RoseRAGDatasetBuilder
from hf_ext.trainers.roserag.sampling import seed_of

NAME, SIZES, RESPONSES, PASSAGES = "rag_builder", (100, 1000, 10_000), 8, 5


class Instant:
    """Writes right and wrong answers, and scores them, without a model."""

    identity = "instant"

    def write(self, conversations: Any, seeds: Any, sampling: Any, prompts: Any) -> list[list[str]]:
        return [
            [f"Because of {'word ' * 40}[1].\nAnswer: {'gold' if s % 2 else 'lead'}" for s in own] for own in seeds
        ]

    def prompt(self, messages: Any, prompts: Any) -> Any:
        return messages

    def score(self, prompt: Any, responses: Any, prompts: Any) -> list[list[float]]:
        return [[-(seed_of(text, n) % 1000) / 100 for n in range(50)] for text in responses]


def rows(count: int) -> Any:
    for number in range(count):
        documents = [{"title": f"t{n}", "text": "some text " * 60, "is_gold": n == 0} for n in range(PASSAGES)]
        yield {"id": str(number), "question": f"question {number}?", "answers": ["gold"], "documents": documents}


def run(count: int) -> None:
    """Print seconds and the peak of this process in MiB."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        data = Dataset.from_generator(rows, gen_kwargs={"count": count}, cache_dir=scratch)
        start = time.perf_counter()
        builder = RoseRAGDatasetBuilder(
            Instant(), n_hinted=RESPONSES, n_unhinted=RESPONSES, batch_size=16, cache_dir=Path(scratch) / "work"
        )
        pairs = builder.build(data, Path(scratch) / "pairs")
        assert len(pairs) > 0.95 * count
        print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    results = []
    for count in SIZES:
        command = [sys.executable, "-m", "benchmarks.rag.builder", str(count)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        results.append({"questions": count, "seconds": float(out[-2]), "peak_mib": float(out[-1])})
    cells = [
        [f"{r['questions']:,}", f"{r['seconds']:.1f}", f"{r['questions'] / r['seconds']:.0f}", f"{r['peak_mib']:.0f}"]
        for r in results
    ]
    head = ["questions", "seconds", "questions per second", "peak of the process, MiB"]
    note = (
        f"{2 * RESPONSES} responses to each question with {PASSAGES} passages, by a writer that takes no time; every stage is kept on disk. "
        "`python -m benchmarks.rag.builder` repeats it."
    )
    table = f"{markdown(head, cells)}\n\n{note}"
    write(NAME, {"command": "python -m benchmarks.rag.builder", "results": results, "table": table})
    print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(int(sys.argv[1]))
    else:
        main()
