"""The command `hf-ext`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from hf_ext._lazy import optional_import
from hf_ext.recipes.methods import TRAINED, find


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments` (the command line if None), run the command, and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-ext: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from hf_ext._compat import is_request_error

        if not is_request_error(error):
            raise
        print(f"hf-ext: the Hub cannot be reached: {error}", file=sys.stderr)
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

    _add_card(commands.add_parser("card", help="build, validate or verify the card of a folder or of a repository"))

    env = commands.add_parser("env", help="show versions, and whether PEFT knows our types")
    env.set_defaults(command=_env)
    return parser


def _demo(options: argparse.Namespace) -> int:
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps {options.steps}: give at least one step, or leave it out.")
    optional_import("trl", "demo")
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


def _add_card(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True)
    target = argparse.ArgumentParser(add_help=False)
    target.add_argument("target", metavar="PATH_OR_REPO")

    build = actions.add_parser(
        "build",
        parents=[target],
        help="write a card, also for what was not made with hf_ext; what is not said now stays as it was",
    )
    for name in ("base-model", "license", "evaluated-on", "intended-use", "out-of-scope", "factors", "ethics"):
        build.add_argument(f"--{name}")
    for name in ("developers", "contact", "title", "cost"):
        build.add_argument(f"--{name}")
    for name in ("method", "language", "datasets", "caveats"):
        build.add_argument(f"--{name}", nargs="+")
    build.add_argument("--license-name", help="of --license other")
    build.add_argument("--license-link", metavar="URL", help="of --license other")
    build.add_argument("--repo-id", help="where the folder will be uploaded, for the code that loads it")
    build.add_argument("--metrics", metavar="FILE", help="JSON object of name: number")
    build.add_argument("--output", metavar="FOLDER", help="write README.md there instead of into the folder itself")
    build.add_argument("--push", action="store_true", help="commit the card of a repository; it is printed otherwise")
    build.set_defaults(command=_card, action="build")

    validate = actions.add_parser(
        "validate", parents=[target], help="what the Hub would reject and a reader would miss"
    )
    validate.set_defaults(command=_card, action="check")

    verify = actions.add_parser(
        "verify",
        parents=[target],
        help="files, answers and code against what was recorded; without a record, whether weights are whole and an adapter fits its base",
    )
    verify.add_argument("--base-model", help="folder or Hub id; what the card names if absent")
    verify.add_argument("--run-snippet", action="store_true", help="run the code of the card; only if you trust it")
    verify.set_defaults(command=_card, action="try_again")


def _card(options: argparse.Namespace) -> int:
    from hf_ext.model_cards import command

    actions = {"build": command.build, "check": command.check, "try_again": command.try_again}
    return actions[options.action](options)


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
