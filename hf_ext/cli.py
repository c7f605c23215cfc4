"""The command `hf-ext`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from hf_ext.recipes.methods import TRAINED, find


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (the command line if None), run the command, and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-ext: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-ext", description="Published methods as parts of the Hugging Face libraries."
    )
    commands = parser.add_subparsers(required=True)

    demo = commands.add_parser("demo", help="edit facts in a real model, measure, publish and load back")
    demo.add_argument("--model", help="Hub id or folder; the embedded Gemma 3 270M if absent")
    demo.add_argument(
        "--edits", help="file of edits (JSON Lines, see docs/EDITING_EVALUATION.md); ten of ours if absent"
    )
    demo.add_argument(
        "--output", default="demo-output", help="folder for adapter, card and results (default: %(default)s)"
    )
    demo.add_argument(
        "--push", metavar="REPO", help="also publish to this repository, on the Hub that HF_ENDPOINT names"
    )
    demo.add_argument("--steps", type=int, help="limit on the training steps")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(command=_demo)

    train = commands.add_parser(
        "train",
        help="train a method from a recipe",
        usage="hf-ext train METHOD --config recipe.yaml [--field value ...]",
        description=f"Methods: {', '.join(TRAINED)}. `hf-ext train METHOD --help` lists the fields of one.",
        epilog="See docs/TRAINING_FROM_RECIPES.md, and examples/recipes/ for a recipe of each.",
    )
    train.add_argument("method", metavar="METHOD")
    train.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    train.set_defaults(command=_train)

    methods = commands.add_parser("methods", help="list the methods")
    methods.set_defaults(command=_methods)

    card = commands.add_parser("card", help="check the card and the files of a model folder before publishing it")
    card.add_argument("folder")
    card.set_defaults(command=_card)

    env = commands.add_parser("env", help="show versions, and whether PEFT knows our types")
    env.set_defaults(command=_env)
    return parser


def _demo(options: argparse.Namespace) -> int:
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps {options.steps}: give at least one step, or leave it out.")
    from hf_ext.demo.run import run

    return run(options.model, options.edits, options.output, options.push, options.steps, options.seed)


def _train(options: argparse.Namespace) -> int:
    find(options.method)
    from hf_ext.recipes.run import train

    return train(options.method, options.arguments)


def _methods(options: argparse.Namespace) -> int:
    from hf_ext.registry import METHODS

    for method in METHODS:
        print(f"{method.name:12s} {method.kind:12s} {next(iter(method.entry_points)):18s} {method.paper_url}")
        print(f"{'':12s} {method.summary}")
        if method.slug in TRAINED:
            print(f"{'':12s} hf-ext train {method.slug}")
    return 0


def _card(options: argparse.Namespace) -> int:
    from hf_ext.model_cards import validate

    report = validate(options.folder)
    for kind, findings in (("error", report.errors), ("warning", report.warnings)):
        for finding in findings:
            print(f"{kind}: {finding.rule}: {finding.message}")
    print(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
    return 1 if report.errors else 0


def _env(options: argparse.Namespace) -> int:
    import torch

    import hf_ext.tuners
    from hf_ext.kernels import native

    packages = "hf-ext torch transformers peft trl diffusers accelerate datasets huggingface-hub bitsandbytes"
    for package in packages.split():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:16s} {version}")
    print(f"{'python':16s} {platform.python_version()} on {platform.platform()}")
    print(f"{'accelerator':16s} {torch.accelerator.current_accelerator() or 'none'}")
    print(f"{'CPU kernels':16s} {native.status()}")
    for name, ours in hf_ext.tuners.register().items():
        print(f"{name:16s} {'registered with PEFT' if ours else 'provided by PEFT itself'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
