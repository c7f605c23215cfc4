"""The page of the public API, `docs/API.md`, from signatures and docstrings.

Public are the names in `__all__` of the packages in `ROOMS`, and in the modules of `MODULES` the functions and classes that they define. What is printed
depends on the sources alone: annotations are printed as they are written, and defaults only where they are plain values.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ForwardRef

import hf_ext
from hf_ext.registry import METHODS

ROOMS = {
    "tuners": "PEFT types, and what is done with adapters.",
    "trainers": "Trainers of TRL with their configurations, data builders and callbacks.",
    "pipelines": "Pipelines of transformers and diffusers, and what they read.",
    "cache": "Caches for `generate`.",
    "metrics": "What methods are judged by.",
    "model_cards": "Cards, their validation, publishing.",
}
# Modules without a package of their own.
MODULES = (
    "hf_ext.tuners",
    "hf_ext.trainers.task_sequence",
    "hf_ext.metrics.calibration",
    "hf_ext.metrics.compression",
    "hf_ext.metrics.continual",
    "hf_ext.metrics.discrete_editing",
)
# Pages of what belongs to no method, or is called otherwise than its method.
PAGES = {
    "hf_ext.tuners": "TUNERS.md",
    "hf_ext.trainers.task_sequence": "methods/adaptive_svd.md",
    "hf_ext.trainers.sft_recipe": "FINE_TUNING_RECIPES.md",
    "hf_ext.metrics.calibration": "methods/tfb.md",
    "hf_ext.metrics.compression": "methods/squat.md",
    "hf_ext.metrics.continual": "methods/adaptive_svd.md",
    "hf_ext.metrics.discrete_editing": "methods/dice.md",
    "hf_ext.metrics.disaggregation": "RESULTS_BY_GROUP.md",
    "hf_ext.metrics.editing": "EDITING_EVALUATION.md",
    "hf_ext.metrics.rag": "methods/roserag.md",
    "hf_ext.metrics.unlearning": "UNLEARNING_EVALUATION.md",
    "hf_ext.model_cards": "PUBLISHING.md",
    **{f"hf_ext.{room}.{m.slug}": f"methods/{m.slug}.md" for m in METHODS for room in ROOMS},
}
# Kinds by the classes they inherit from, the first that fits.
KINDS = {
    "BaseException": "exception",
    "Trainer": "trainer",
    "TrainerCallback": "callback",
    "DiffusionPipeline": "pipeline",
    "Pipeline": "pipeline",
    "Optimizer": "optimizer",
    "Cache": "cache",
    "CacheLayerMixin": "cache layer",
    "BaseTuner": "PEFT model",
    "Module": "module",
    "Protocol": "protocol",
}
WITHOUT_CALL = ("constant", "protocol", "exception")
WIDTH = 140


@dataclass(frozen=True)
class Entry:
    """One public name.

    Attributes:
        module: where users import it from.
        name: the name.
        value: what it names.
    """

    module: str
    name: str
    value: Any

    @property
    def kind(self) -> str:
        if not inspect.isclass(self.value):
            return "function" if inspect.isfunction(self.value) else "constant"
        if self.name.endswith("Config"):
            return "config"
        bases = [base.__name__ for base in self.value.__mro__]
        return next((kind for base, kind in KINDS.items() if base in bases), "class")

    @property
    def doc(self) -> str:
        """Its own docstring, cleaned; empty if it has none. A constant has the string that follows it."""
        if self.kind == "constant":
            return _constant_doc(self.module, self.name)
        text = self.value.__dict__.get("__doc__") if inspect.isclass(self.value) else self.value.__doc__
        generated = text is not None and text.startswith(f"{self.name}(")  # by `dataclass`
        return "" if text is None or generated else inspect.cleandoc(text)

    @property
    def summary(self) -> str:
        """The first paragraph."""
        return _line(self.doc.split("\n\n")[0])

    @property
    def raises(self) -> list[tuple[str, str]]:
        """Exceptions and when they are raised, as far as the docstrings say."""
        docs = [self.doc]
        if inspect.isclass(self.value) and "__init__" in self.value.__dict__:
            docs.append(inspect.cleandoc(self.value.__init__.__doc__ or ""))
        sections = [re.search(r"^Raises:\n((?:    .*\n?|\n)+)", doc, re.M) for doc in docs]
        text = "".join(textwrap.dedent(section[1]) for section in sections if section)
        found = re.findall(r"^(\w+): (.*(?:\n    .*)*)", text, re.M)
        return [(error, _line(when)) for error, when in found]


def _line(text: str) -> str:
    """One line, without the brackets that link names in the docstrings of Hugging Face's libraries."""
    return re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", " ".join(text.split()))


def modules() -> list[str]:
    """Modules with public names, room by room."""
    found = []
    for room in ROOMS:
        package = importlib.import_module(f"hf_ext.{room}")
        children = [f"hf_ext.{room}.{info.name}" for info in pkgutil.iter_modules(package.__path__) if info.ispkg]
        for name in [package.__name__, *children]:
            if "__all__" in vars(importlib.import_module(name)):
                found.append(name)
        found += [name for name in MODULES if name.split(".")[1] == room]
    return sorted(found, key=lambda name: (list(ROOMS).index(name.split(".")[1]), name))


def entries(module: str) -> list[Entry]:
    """The public names of `module`, in alphabetical order."""
    namespace = importlib.import_module(module)
    if module in MODULES:
        names = [
            name
            for name, value in vars(namespace).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module and callable(value)
        ]
    else:
        names = list(namespace.__all__)
    found = [Entry(module, name, getattr(namespace, name)) for name in sorted(names, key=str.lower)]
    # What a package only passes on from a module that has a section is told there.
    return [entry for entry in found if getattr(entry.value, "__module__", module) not in set(MODULES) - {module}]


def _constant_doc(package: str, name: str) -> str:
    """The string that follows the assignment of `name` somewhere in `package`."""
    for path in sorted(Path(inspect.getfile(importlib.import_module(package))).parent.glob("*.py")):
        for statement, following in pairwise(ast.parse(path.read_text()).body):
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
            if named and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                return inspect.cleandoc(str(following.value.value))
    return ""


def _ours(cls: type) -> bool:
    return cls.__module__.startswith("hf_ext")


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str) or value == {}


def _default(value: Any) -> str:
    """A short plain value, else three dots."""
    text = repr(value) if _plain(value) else ""
    return text if 0 < len(text) <= 40 else "..."


def _type(annotation: Any) -> str:
    """An annotation as it is written; most are text, since evaluation is postponed."""
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _parameters(signature: inspect.Signature) -> list[str]:
    """Parameters as they are written, with the star before those that have to be named."""
    written = []
    starred = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            written.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = stars + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {_type(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {_default(parameter.default)}"
        written.append(text)
    return written


def _fields(cls: type) -> list[str]:
    """The fields that a dataclass adds or changes, behind those that it inherits, which are summed up."""
    parents = [base.__name__ for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    written = [f"<fields of {' and '.join(parents)}>"] if parents else []
    own = inspect.get_annotations(cls)
    for field in dataclasses.fields(cls):
        if field.name not in own or not field.init or field.name.startswith("_"):
            continue
        # Not the field's own type, into which transformers' parser of arguments writes what it makes of it.
        text = f"{field.name}: {_type(own[field.name])}"
        if field.default_factory is not dataclasses.MISSING:
            text += f" = {_default(field.default_factory())}"
        elif field.default is not dataclasses.MISSING:
            text += f" = {_default(field.default)}"
        written.append(text)
    return written


def signature(entry: Entry) -> str:
    """How it is called; empty for constants, protocols and exceptions, and for classes that take the arguments of another."""
    value = entry.value
    if entry.kind in WITHOUT_CALL:
        return ""
    if not inspect.isclass(value):
        found = inspect.signature(value)
        returned = "" if found.return_annotation is found.empty else f" -> {_type(found.return_annotation)}"
        return _wrapped(entry.name, _parameters(found), returned)
    if dataclasses.is_dataclass(value) and "__init__" in value.__dict__:
        return _wrapped(entry.name, _fields(value))
    return _wrapped(entry.name, _parameters(inspect.signature(value))) if _maker(value) is value else ""


def _maker(cls: type) -> type:
    """The class whose arguments `cls` takes."""
    return next(base for base in cls.__mro__ if "__init__" in vars(base) or "__new__" in vars(base))


def _wrapped(name: str, parameters: list[str], after: str = "") -> str:
    """A call in lines of at most `WIDTH` characters, broken between parameters."""
    lines = [f"{name}("]
    for number, parameter in enumerate(parameters, start=1):
        text = parameter + (", " if number < len(parameters) else f"){after}")
        if len(lines[-1] + text.rstrip()) > WIDTH:
            lines.append("    ")
        lines[-1] += text
    return "\n".join(line.rstrip() for line in lines) if parameters else f"{name}(){after}"


@cache
def _public_classes() -> frozenset[type]:
    return frozenset(e.value for module in modules() for e in entries(module) if inspect.isclass(e.value))


def members(entry: Entry) -> list[str]:
    """Methods and properties of a class that neither its library's base classes have, nor a base class with an entry of its own."""
    if not inspect.isclass(entry.value):
        return []
    told = [base for base in entry.value.__mro__[1:] if not _ours(base) or base in _public_classes()]
    known = {name for base in told for name in vars(base)}
    own = {n: v for base in reversed(entry.value.__mro__) if base not in told for n, v in vars(base).items()}
    names = [name for name in own if not name.startswith("_") and name not in known]
    properties = {name for name in names if isinstance(own[name], (property, cached_property))}
    return [n if n in properties else f"{n}()" for n in names if n in properties or inspect.isroutine(own[n])]


def paragraph(entry: Entry) -> str:
    """What the page says of one name."""
    at_top = f", also `hf_ext.{entry.name}`" if getattr(hf_ext, entry.name, None) is entry.value else ""
    text = f"*{entry.kind}*{at_top}. {entry.summary}"
    shown = signature(entry)
    if not shown and entry.kind not in WITHOUT_CALL and _maker(entry.value) is not object:
        text += f" Takes the arguments of `{_maker(entry.value).__name__}`."
    if names := members(entry):
        text += f" Members: {', '.join(f'`{name}`' for name in names)}."
    if entry.raises:
        text += " Raises " + " ".join(f"`{error}`: {when}" for error, when in entry.raises)
    # A fence needs no blank lines around it, and the page is half as long without.
    return "\n".join([f"#### {entry.name}", *([f"```text\n{shown}\n```"] if shown else []), text])


def page() -> str:
    """`docs/API.md`."""
    parts = [
        "# Public API",
        "Every public name with how it is called, what it does and what it raises, from the sources (`make docs`). A configuration lists the fields that it adds or "
        "changes; `...` is a default that is no short plain value. Arguments, shapes and returned values in full are in the docstrings, the reasons on the pages that are linked.",
    ]
    room = ""
    for module in modules():
        if module.split(".")[1] != room:
            room = module.split(".")[1]
            parts.append(f"## {room}\n{ROOMS[room]}")
        about = _line((importlib.import_module(module).__doc__ or "").split("\n\n")[0])
        parts.append(f"### {module}\n{about} See [{PAGES[module]}]({PAGES[module]}).")
        parts += [paragraph(entry) for entry in entries(module)]
    return "\n\n".join(parts) + "\n"
