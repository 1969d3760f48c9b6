"""A dataclass as a command line: the fields of `Args` in train.py, merge.py and eval.py.

    inputs: list                a field without default is a positional argument
    "files to read"             the string under a field is its help

    # update                    a comment line heads the fields below it in --help
    lr: float = 3e-4
    "AdamW's learning rate"

A mistake in a flag, or in a file that a flag names, ends the program with one line and code 2.
"""

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
from contextlib import contextmanager
from typing import Literal, get_args, get_origin

from support.processes import rank


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and adds the default to a help that does not name it."""

    def _get_help_string(self, action):
        if action.default == "" or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def parse_args(cls, description, argv=None):
    """The command line `argv` as an instance of the dataclass `cls`. A bad flag exits with 2."""
    helps, sections = read_fields(cls)
    parser = Parser(description=description, allow_abbrev=False, formatter_class=Help)
    groups = {}
    for title in sections.values():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)

    for field in dataclasses.fields(cls):
        name = field.name
        text = helps[name]
        if field.default is dataclasses.MISSING:
            parser.add_argument(name, help=text, **keywords(field))
        else:
            group = groups[sections[name]]
            group.add_argument(f"--{name}", default=field.default, help=text, **keywords(field))
    return cls(**vars(parser.parse_args(argv)))


def read_fields(cls):
    """{field: help} and {field: section}: the string under a field, the comment above its group."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    helps = {}
    sections = {}
    section = None
    field = None  # a string above the first field describes the class
    previous_end = 0
    for statement in ast.parse(source).body[0].body:
        for line in lines[previous_end : statement.lineno - 1]:
            if line.strip().startswith("# "):
                section = line.strip()[2:]
        previous_end = statement.end_lineno

        if isinstance(statement, ast.AnnAssign):
            field = statement.target.id
            sections[field] = section
        elif isinstance(statement, ast.Expr) and field:
            helps[field] = " ".join(statement.value.value.split())
    return helps, sections


def keywords(field):
    """How argparse reads a field: keyword arguments of add_argument."""
    if field.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if field.type is list:
        return {"nargs": "+", "metavar": field.name.rstrip("s").upper()}
    if get_origin(field.type) is Literal:
        return {"choices": get_args(field.type)}
    return {"type": field.type, "metavar": field.type.__name__}


def one_line(text, longest=280):
    """Any text as one line of at most `longest` characters, without control characters.

    Names and files are their writers' text: a terminal obeys what stands in it. The middle is left
    out of a long one, because the value comes first and the remedy last.

    >>> one_line("a bell\\a"), one_line("abcdefghij" * 9, 25)
    ('a bell\\\\x07', 'abcdefghij ... abcdefghij')
    """
    shown = ""
    for character in str(text):
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        shown += character
    if len(shown) > longest:
        half = (longest - 5) // 2
        shown = f"{shown[:half]} ... {shown[-half:]}"
    return shown


def refuse(error):
    """Ends the program for a user's mistake: one line on stderr (of the first process), code 2."""
    if rank() == 0:
        print(f"error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """argparse's, whose mistakes are one line, too."""

    def error(self, message):
        refuse(f"{message}; --help lists the flags")


@contextmanager
def refusing():
    """Within the block a ValueError is the user's mistake: a file whose damage shows on loading."""
    try:
        yield
    except ValueError as error:
        refuse(error)
