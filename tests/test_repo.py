"""The house rules that a reader relies on: who may import whom, how long things are, that no file is read that can run code; and that
mutations.py finds where its bugs go."""
import ast
import doctest
import importlib
import re

import pytest

from conftest import ROOT
from mutations import BUGS

MODULES = sorted(ROOT.glob("*.py"))
SOURCES = MODULES + sorted((ROOT / "experiments").glob("*.py"))
NAMES = {path.stem for path in MODULES}
COMMANDS = {"train", "eval", "merge"}
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """The top-level names of all that a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_the_modules_are_there():
    assert {"train", "sampling", "prompting", "shaping", "dist_reward", "rewards", "models", "runtime", "eval", "features", "checks",
            "merge", "weights", "lora", "model_files", "metrics", "picture_sets", "compare", "sit", "edm2", "guards"} <= NAMES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_imports_train(path):
    assert "train" not in imports(path)


@pytest.mark.parametrize("name", ["sampling", "prompting", "shaping", "dist_reward"])
def test_the_ideas_stand_alone(name):
    assert not imports(ROOT / f"{name}.py") & (COMMANDS | {"models", "rewards", "runtime", "features", "checks"})


@every_source
def test_no_file_is_read_that_can_run_code(path):
    own_unpickler = {"pickle"} if path.name == "edm2.py" else set()       # it admits inert stand-ins alone, and is used as a base class alone
    assert not imports(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} - own_unpickler
    used = {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pickle.")}
    assert used <= {"pickle.Unpickler", "pickle.UnpicklingError"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
            name = ast.unparse(node.func)
            assert keywords.get("allow_pickle", False) is False, f"line {node.lineno}"
            assert name not in ("eval", "exec", "__import__"), f"line {node.lineno}"
            assert name != "torch.load" or keywords.get("weights_only") is True, f"line {node.lineno}"
            assert keywords.get("weights_only", True) is True and not keywords.get("shell"), f"line {node.lineno}"


@every_source
def test_no_bare_assert_guards_anything(path):
    assert [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)] == []


@every_source
def test_each_file_says_what_it_is(path):
    text = ast.get_docstring(tree(path))
    assert text and re.match(r"[A-Z].*[.:]", text.splitlines()[0])
    assert path.read_text().startswith('"""')


@every_source
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 350
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 75, node.name


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.stem)
def test_no_test_is_hidden_by_another_of_its_name(path):
    names = [node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)]
    assert sorted(names) == sorted(set(names))


EXAMPLES = ["sampling", "prompting", "shaping", "dist_reward", "rewards", "metrics", "compare", "weights", "merge", "lora", "sharding"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_the_docstrings_are_true(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("bug", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_bug_that_mutations_plants_has_one_place(bug):
    _, name, old, new, tests = bug
    assert (ROOT / name).read_text(encoding="utf-8").count(old) == 1 and old != new
    assert all((ROOT / word).is_file() for word in tests.split() if word.endswith(".py"))
