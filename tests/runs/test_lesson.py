"""lesson.ipynb: its cells are short, were run, and still run."""

import json
from pathlib import Path

import pytest

from commands import compare

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "lesson.ipynb"
CODE = [
    cell
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]
SMALL = {"ITERATIONS": 2, "PICTURES": 20}  # in place of the notebook's own


def test_it_is_small_and_has_its_output():
    assert NOTEBOOK.stat().st_size < 1_000_000
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(cell["execution_count"] == number for number, cell in enumerate(CODE, 1))
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10


def test_a_cell_has_at_most_ten_lines():
    assert max(len(cell["source"]) for cell in CODE) <= 10


@pytest.mark.slow
def test_its_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    plt = compare.pyplot()  # without a screen
    namespace = {}
    for number, cell in enumerate(CODE, 1):
        source = "".join(cell["source"])
        exec(compile(source, f"lesson.ipynb, cell {number}", "exec"), namespace)
        if "ITERATIONS =" in source:
            namespace |= SMALL | {"RUNS": str(tmp_path)}
        plt.close("all")
    said = capsys.readouterr().out
    assert said.count("2 iterations; see report.png first") == 2
    assert "largest |ratio - 1|: 0.0\n" in said
    assert (tmp_path / "compare.png").is_file()
