"""Every benchmark in turn, each in a process of its own: `make bench`."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = (
    "roselora_cost",
    "neat_cost",
    "neat_facts",
    "baft_cost",
    "baft_world",
    "tfb_cost",
    "tfb_digits",
    "dice_cost",
    "dice_image",
    "dice_text",
    "lorvp_cost",
    "lorvp_digits",
    "overtone_cost",
    "memorised_facts",
    "overtone_world",
    "editing",
    "kv_cache.quality",
    "kv_cache.decode",
    "kv_cache.memory",
    "unlearning.cost",
    "unlearning.islands",
    "unlearning.author",
    "rag.builder",
    "rag.facts",
    "rag.pretrained",
    "baft_editing",
    "tfb_pretrained",
    "continual.cost",
    "continual.five_tasks",
    "continual.pretrained",
    "continual.exactness",
    "summary",
)


def main() -> None:
    for name in SCRIPTS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
