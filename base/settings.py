"""Settings as frozen dataclasses: checked against their annotations, read from the command line, explained by --help.

A field's meaning is the string below it in the source. One checker serves flags, Python files and JSON.
"""

import ast
import contextlib
import inspect
import itertools
import json
import math
import shutil
import sys
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from base import nanogpt
from base.errors import UserError, near_name

Settings = TypeVar("Settings")


# ---- checking ---------------------------------------------------------------------------------------------------------


def check_types(values: dict[str, Any], cls: type) -> None:
    """UserError if one of the values for a dataclass's fields is nothing that its annotation allows."""
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not any(_fits(value, kind) for kind in _kinds(hints[name])):
            raise UserError(f"{name}={value!r} is not allowed: {name} is {_allowed(hints[name])}")


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """UserError if one of the named fields is smaller than `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise UserError(f"{name}={getattr(settings, name)} must be at least {least}")


def _kinds(hint: Any) -> tuple:
    """The alternatives of an annotation: a type, or one Literal with its choices, each."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # exactly: True is no int here


def _allowed(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
    choices: list[str] = []
    for kind in _kinds(hint):
        choices += map(repr, get_args(kind)) if get_origin(kind) is Literal else [names[kind]]
    return " or ".join(choices)


# ---- the command line -------------------------------------------------------------------------------------------------


def split_positional(default: Any, argv: list[str]) -> tuple[list[str], list[str]]:
    """argv -> (arguments that are no flag, flags with their values), in whatever order they were given."""
    hints, positional, found = get_type_hints(type(default)), [], []
    tokens = iter(argv)
    for token in tokens:
        if not token.startswith("-") or token == "-":
            positional.append(token)
            continue
        found.append(token)
        hint = hints.get(token[2:].replace("-", "_"))  # None if it has its value after a "=", or is unknown
        if hint is not None and bool not in _kinds(hint):
            found += itertools.islice(tokens, 1)
    return positional, found


def parse(default: Settings, argv: list[str], description: str) -> Settings:
    """`default` (a frozen dataclass) with the flags of argv applied: --name=value, --name value, or a bare --name for True
    (a yes-or-no setting takes its value only after a "=", so that a file may follow it).

    Prints help and exits on --help. Raises UserError, one line, for anything it does not understand.
    """
    hints, values = get_type_hints(type(default)), {}
    tokens = iter(argv)
    for token in tokens:
        if token in ("-h", "--help"):
            print(help_text(default, description))
            sys.exit()
        name, equals, text = token[2:].partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--"):
            raise UserError(f"{token!r} is not understood: settings are given as --name=value")
        if name not in hints:
            raise UserError(f"--{name} is not a setting: {meant(name, list(hints))}")
        if not equals:
            text = "True" if bool in _kinds(hints[name]) else next(tokens, None)
        if text is None:
            raise UserError(f"--{name} needs a value: use --{name}=…, {_allowed(hints[name])}")
        values[name] = _value(name, text, hints[name])
    return replace(default, **values)


def meant(name: str, known: list[str]) -> str:
    """What to use instead of a name that is no setting: nanoGPT's names are known, others may be near one of ours."""
    if name in nanogpt.NAMES and name != "init_from":
        return f"nanoGPT's {name} is {nanogpt.NAMES[name]}"
    return near_name(name, known)


def _value(name: str, text: str, hint: Any) -> Any:
    """A value as it was given on the command line: 1000, 1e3, true, True, cosine."""
    for kind in _kinds(hint):
        if get_origin(kind) is Literal and text in get_args(kind):
            return text
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is str:
            return text
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return int(text)
            with contextlib.suppress(ValueError):
                number = float(text)
                if kind is int and number.is_integer():
                    return int(number)
                if kind is float and math.isfinite(number):
                    return number
    raise UserError(f"{name}={text!r} is not allowed: {name} is {_allowed(hint)}")


def field_docs(cls: type) -> dict[str, str]:
    """{field: the string below it in the source} of a dataclass and its parents."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0].body
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[field.target.id] = doc.value.value
    return docs


def help_text(default: Any, description: str) -> str:
    """What --help prints: the script's own words, then each setting with its default and its meaning."""
    width = max(60, shutil.get_terminal_size().columns - 2)
    lines = [f"usage: {Path(sys.argv[0]).name} … [--name=value …]", "", description.strip(), "", "settings:"]
    for name, doc in field_docs(type(default)).items():
        lines.append(f"  --{name} = {getattr(default, name)!r}  ({_allowed(get_type_hints(type(default))[name])})")
        lines += textwrap.wrap(" ".join(doc.split()), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def flags(settings: Any) -> list[str]:
    """A settings dataclass as command-line flags, all of them: the reverse of parse()."""
    return [f"--{name}={value}" for name, value in asdict(settings).items()]


def from_json(text: str, cls: type) -> dict[str, Any]:
    """The values for a settings dataclass in JSON that may be untrusted: known names and right types only, else UserError."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError("not a JSON object")
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"{unknown[0]} is not a setting of {cls.__name__}: {near_name(unknown[0], sorted(known))}")
    check_types(values, cls)  # before cls computes with them
    return values
