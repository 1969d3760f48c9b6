"""flags.py: a dataclass read as a command line, and the one line that refuses."""

from dataclasses import dataclass
from typing import Literal

import pytest

from support import flags


@dataclass
class Args:
    """A class, whose own string is no help."""

    command: Literal["draw", "score"]
    """what to do"""
    inputs: list
    """folders"""

    # the run
    out: str = ""
    """folder to write (default: made of the flags)"""
    steps: int = 8
    """sampling steps of a rollout,
    in one line"""
    # update
    lr: float = 3e-4
    """learning rate"""
    gardo: bool = False
    """protects"""
    kernel: Literal["cps", "ancestral"] = "cps"
    """rule of the step"""


def parse(line):
    return flags.parse_args(Args, "Draws.\n\n    a table\n", line.split())


def test_fields_are_read_with_their_types_and_defaults():
    assert parse("draw a b") == Args("draw", ["a", "b"])
    args = parse("score a --out x --steps 3 --lr 0.5 --gardo --kernel ancestral")
    assert args == Args("score", ["a"], "x", 3, 0.5, True, "ancestral")
    assert parse("draw a --gardo --no-gardo").gardo is False


def test_help_is_the_string_under_a_field_below_its_section(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "Draws.\n\n    a table\n" in text
    words = " ".join(text.split())
    expected = (
        "{draw,score} what to do INPUT folders "
        "the run: --out str folder to write (default: made of the flags) "
        "--steps int sampling steps of a rollout, in one line (default: 8) "
        "update: --lr float learning rate (default: 0.0003) "
        "--gardo, --no-gardo protects (default: False) "
        "--kernel {cps,ancestral} rule of the step (default: cps)"
    )
    without_options = words.replace("options: -h, --help show this help message and exit ", "")
    assert expected in without_options


@pytest.mark.parametrize(
    "line, named",
    [
        ("draw a --ste 3", "--ste"),  # no abbreviations
        ("draw a --steps 2.5", "2.5"),
        ("draw a --kernel euler", "euler"),
        ("draw", "INPUT"),
    ],
)
def test_a_bad_flag_is_named_and_ends_with_2(line, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("rank, line", [("0", "error: --lr -1: too low\n"), ("1", "")])
def test_a_mistake_is_one_line_of_the_first_process(monkeypatch, capsys, rank, line):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop, flags.refusing():
        raise ValueError("--lr -1: too low")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", line)


def test_other_errors_are_not_the_users_mistake():
    with pytest.raises(RuntimeError), flags.refusing():
        raise RuntimeError("a bug")


HOSTILE = ["two\nlines", "\x1b[2Jcleared", "a\u202egnp.exe", "\ud800", "x" * 5000, "\0" * 400]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_message_is_one_short_line_that_no_terminal_obeys(text, capsys):
    with pytest.raises(SystemExit), flags.refusing():
        raise ValueError(f"--out {text}: is no folder; choose another --out")
    with pytest.raises(SystemExit):
        flags.parse_args(Args, "", ["draw", "a", "--kernel", text])
    lines = capsys.readouterr().err.split("\n")[:-1]
    assert len(lines) == 2
    for line, end in zip(lines, ("; choose another --out", "; --help lists the flags")):
        assert line.startswith("error: ") and line.endswith(end)
        assert len(line) <= 300 and line.isprintable()


def test_a_short_message_is_left_as_it_is():
    text = "--lr -1: zu klein, größer als 0; 東京"
    assert flags.one_line(text) == text
    assert len(flags.one_line("a" * 300, 30)) <= 30
