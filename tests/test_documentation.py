"""Examples in docstrings run; what CONTRIBUTING.md names is there; the hooks run the pinned ruff."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HOMES = {"sagelib": "sagelib", "workbench": "notebooks/workbench", "townscape": "data/townscape"}
MODULES = [
    ".".join([package, *path.relative_to(ROOT / home).with_suffix("").parts]).removesuffix(".__init__")
    for package, home in HOMES.items()
    for path in sorted((ROOT / home).rglob("*.py"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    outcome = doctest.testmod(module)
    assert outcome.failed == 0
    assert outcome.attempted or ">>>" not in Path(module.__file__).read_text(encoding="utf-8")


def test_what_contributing_names_is_there():
    text, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "Makefile"))
    for target in re.findall(r"`make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for name in re.findall(r"`((?:notebooks|sagelib|tests)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    rooms = re.search(r"```\n(sagelib/.*?)```", text, re.S)[1]
    assert {path.name for path in (ROOT / "sagelib").glob("[!_]*.py")} <= set(re.findall(r"\w+\.py", rooms))


def test_hooks_run_the_ruff_of_the_environment():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split()[:2] for hook in repo["hooks"]]
    assert repo["repo"] == "local" and entries == [[".venv/bin/ruff", "check"], [".venv/bin/ruff", "format"]]
