"""A dataclass as a command line."""
import argparse
import ast
import textwrap
import dataclasses
import inspect
import re
import sys
from contextlib import contextmanager
from typing import Literal
from typing import get_args
from typing import get_origin
from support.processes import rank

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each flag that has one and does not say it itself, and the file's header as it stands."""

    def _get_help_string(self, action):
        return action.help if action.default == "" or "(default" in action.help else super()._get_help_string(action)


def parse_args(cls, description, argv=None):
    """A dataclass as a command line: each field's name, type and default, and its trailing comment as help. Bad flags exit with 2."""
    source, section, sections = inspect.getsource(cls), None, {}
    comments = dict(re.findall(r"^ +(\w+) *:.*?# *(.+)$", source, re.M))
    body = ast.parse(textwrap.dedent(source)).body[0].body
    for field, text in zip(body, body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            comments[field.target.id] = " ".join(text.value.value.split())
    for line in source.splitlines():
        if title := re.match(r" +# (.+)$", line):
            section = title[1]
        elif field := re.match(r" +(\w+) *:", line):
            sections[field[1]] = section
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=Help)
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(sections.values())}
    for f in dataclasses.fields(cls):
        kind = {"choices": get_args(f.type)} if get_origin(f.type) is Literal else {"type": f.type, "metavar": f.type.__name__}
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else kind
        if f.default is dataclasses.MISSING:                             # a field without default is positional; a list takes one or more
            parser.add_argument(f.name, help=comments[f.name], **({"nargs": "+", "metavar": f.name.rstrip("s").upper()} if f.type is list else kind))
            continue
        groups[sections[f.name]].add_argument("--" + f.name, default=f.default, help=comments[f.name], **kind)
    return cls(**vars(parser.parse_args(argv)))


def refuse(error):
    """A user's mistake: one line on stderr (from the first process only), exit code 2."""
    if rank() == 0:
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def refusing():
    """Within the block a ValueError is the user's mistake: one that shows only when a file is read whole."""
    try:
        yield
    except ValueError as error:
        refuse(error)
