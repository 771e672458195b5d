"""Every field of a recipe with its default and meaning, read from the dataclasses that define it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing

from hotloop.engine.config import Recipe

WIDTH = 110
MEANING_AT = 36


def recipe_help() -> str:
    lines = []
    hints = typing.get_type_hints(Recipe)
    for section in dataclasses.fields(Recipe):
        cls = hints[section.name]
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            lines.append(_line(f"{section.name} = {_default(section.default)}", _meaning("", cls)))
            continue
        lines.append(f"[{section.name}]")
        documented, types_ = _docstrings(cls), typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            mark = "*" if field.metadata.get("execution") else " "
            meaning = _meaning(documented.get(field.name, ""), types_[field.name])
            lines.append(_line(f"{mark} {field.name} = {_default(field.default)}", meaning))
    return "\n".join(lines)


def _line(assignment: str, meaning: str) -> str:
    first = assignment.ljust(MEANING_AT - 1) + " "
    if not meaning:
        return assignment
    return textwrap.fill(
        meaning, WIDTH, initial_indent=first, subsequent_indent=" " * MEANING_AT, break_on_hyphens=False
    )


def _default(value: object) -> str:
    """As TOML has it, but for `none`, which is a string there and unquoted is understood by --set."""
    if value is None:
        return "none"
    if value == ():
        return "[]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(text: str, hint: object) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        choices = " | ".join(typing.get_args(hint))
        return f"{choices}. {text}".strip()
    return text


def _docstrings(cls: type) -> dict[str, str]:
    """Field -> the string that follows it in the class's source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found
