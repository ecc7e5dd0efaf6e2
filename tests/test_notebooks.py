"""What every notebook promises: one cell of parameters, outputs kept, short cells, no definitions, no errors, help for each parameter."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PARAMETERS = sorted((ROOT / "notebooks" / "params").glob("*.yaml"))


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [
        c
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == kind and "".join(c["source"]).strip()
    ]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no numbered notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_was_run_in_order_without_errors_and_keeps_its_outputs(self, path):
        """A notebook stripped of outputs would pass ``pytest --nbval`` without checking anything."""
        counts = [c["execution_count"] for c in cells(path)]
        assert counts == list(range(1, len(counts) + 1)), (
            f"{path.name} was not run top to bottom: `make notebooks`"
        )
        kinds = [o["output_type"] for c in cells(path) for o in c["outputs"]]
        assert "error" not in kinds
        texts = [
            o
            for c in cells(path)
            for o in c["outputs"]
            if o["output_type"] == "stream" or "text/plain" in o.get("data", {})
        ]
        assert len(texts) >= 3, f"{path.name} keeps too few outputs to be read without running"

    def test_has_one_cell_of_parameters_each_explained(self, path):
        tagged = [c for c in cells(path) if "parameters" in tags(c)]
        assert len(tagged) == 1
        for line in source(tagged[0]).splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                assert "=" in line and ":" in line.split("=")[0], f"{path.name}: give {line!r} a type"
                assert "  # " in line, f"{path.name}: say what {line!r} is, after two spaces and a #"

    def test_cells_are_short_and_define_nothing(self, path):
        for cell in cells(path):
            # One line a parameter, however many an experiment has.
            most, lines = (40 if "parameters" in tags(cell) else 15), len(source(cell).splitlines())
            assert lines <= most, f"{path.name}: a cell of {lines} lines"
            tree = ast.parse(
                "\n".join(line for line in source(cell).splitlines() if not line.startswith(("%", "!")))
            )
            defined = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            assert not defined, f"{path.name} defines {defined}: functions live in sagelib"

    def test_explains_itself(self, path):
        assert source(cells(path, "markdown")[0]).startswith("# ")
        assert len(cells(path, "markdown")) >= len(cells(path)) / 3

    def test_stores_no_path_of_a_machine(self, path):
        text = path.read_text()
        assert (
            "/home/" not in text and "/work/" not in text and "/root/" not in text and "/Users/" not in text
        )

    def test_is_small_enough_for_git(self, path):
        assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda p: p.stem)
def test_parameter_files_name_only_parameters_that_exist(path):
    values = yaml.safe_load(path.read_text())
    declared = set()
    for notebook in NOTEBOOKS:
        tree = ast.parse(source(next(c for c in cells(notebook) if "parameters" in tags(c))))
        declared |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert set(values) <= declared, (
        f"{path.name} sets parameters that no notebook has: {sorted(set(values) - declared)}"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_explains_every_parameter(path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", str(path)], capture_output=True, text=True
    )
    tree = ast.parse(source(next(c for c in cells(path) if "parameters" in tags(c))))
    for name in [node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)]:
        assert name in done.stdout, (
            f"papermill does not see the parameter {name} of {path.name}: {done.stdout}{done.stderr}"
        )
    assert "Unknown type" not in done.stdout
