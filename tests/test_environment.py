"""One source of versions, a light import, and rooms that import only from above their line."""

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import make_sets
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from sagelib import model

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """The exact versions of environment.yml, by normalised name."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    lines = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [
        Requirement(line) for line in PROJECT["dependencies"] + [line for extra in extras for line in extra]
    ]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_inside_its_range(requirement):
    pinned = pins()
    assert normal(requirement.name) in pinned, (
        f"{requirement.name} is in pyproject.toml but not in environment.yml"
    )
    assert Version(pinned[normal(requirement.name)]) in requirement.specifier


def test_nothing_is_pinned_that_is_not_a_dependency():
    assert set(pins()) == {normal(r.name) for r in requirements()}


def test_the_makefile_installs_exactly_the_pins():
    """The sed line of the Makefile reads every pin of environment.yml, and nothing else."""
    expression = (
        re.search(r"sed -n '(.+?)' environment.yml", (ROOT / "Makefile").read_text())
        .group(1)
        .replace("$$", "$")
    )
    printed = subprocess.run(
        ["sed", "-n", expression, "environment.yml"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {normal(line.split("==")[0]): line.split("==")[1] for line in printed.stdout.split()} == pins()


@pytest.mark.skipif(
    not Path(sys.prefix, ".installed").exists(), reason="not the environment that make installs"
)
def test_what_is_installed_is_what_is_pinned():
    wrong = {name: (pin, version(name)) for name, pin in pins().items() if version(name).split("+")[0] != pin}
    assert not wrong, f"pinned and installed versions differ: {wrong}"


def test_conda_and_pyproject_ask_for_the_same_python():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in listed if isinstance(entry, str) and entry.startswith("python="))
    assert (
        Version(python.removeprefix("python="))
        in Requirement(f"python{PROJECT['requires-python']}").specifier
    )


def test_importing_the_package_is_light_and_silent():
    """``import sagelib`` brings no torch, prints nothing, and leaves torch's global settings alone."""
    program = (
        "import sys, sagelib; assert not {'torch', 'timm'} & set(sys.modules); print(sagelib.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_importing_every_module_has_no_side_effects():
    """No global seed, thread count, default type, device choice, warning filter or print at import."""
    folders = {"sagelib": "sagelib", "workbench": "notebooks/workbench", "townscape": "data/townscape"}
    folders["workbench.figures"] = "notebooks/workbench/figures"
    modules = sorted(f"{name}.{p.stem}" for name, at in folders.items() for p in (ROOT / at).glob("*.py"))
    program = f"""
import json, random, sys, warnings
import numpy, torch, timm, torchvision, matplotlib, IPython.display
random.seed(7); numpy.random.seed(7); torch.manual_seed(7)
def state():
    generators = random.getstate()[1], numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    globals = torch.get_num_threads(), str(torch.get_default_dtype()), matplotlib.get_backend()
    return [len(warnings.filters), *globals, *(state[:64] for state in generators)]
before = state()
import importlib
for name in {modules!r}:
    importlib.import_module(name.removesuffix(".__init__"))
after = state()
print(json.dumps([str(a) for a, b in zip(before[1:], after[1:]) if a != b]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**__import__("os").environ, "MPLBACKEND": "Agg"},
    )
    assert json.loads(done.stdout.strip().splitlines()[-1]) == []
    assert done.stdout.count("\n") == 1, f"a module prints at import: {done.stdout}"


# The rooms, ground floor first: a room imports only from above its own line.
HOUSE = [
    {"runs"},
    {"places"},
    {"images"},
    {"backbone", "softp", "interact", "aggregators"},
    {"model", "weights"},
    {"graph"},
    {"sampler"},
    {"describe"},
    {"retrieval"},
    {"train", "evaluate"},
]
OURS = {"sagelib", "workbench", "townscape"}
FIGURES = [p.name for p in (ROOT / "notebooks" / "workbench" / "figures").glob("*.py")]


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, as ``package.module``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            whole = node.module.count(".")
            found |= {node.module} if whole else {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path.name}: import by the full name, not relatively")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in OURS}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "sagelib").glob("*.py")), ids=lambda p: p.stem)
def test_a_room_imports_only_from_above_its_line(path):
    """The method knows neither the pages nor the town."""
    if path.stem == "__init__":
        assert imports_of(path) == set()
        return
    floor = {f"sagelib.{room}": number for number, rooms in enumerate(HOUSE) for room in rooms}
    own = f"sagelib.{path.stem}"
    assert own in floor, f"{path.name} has no place in the house: give it one here and in the README"
    below = {other for other in imports_of(path) if floor.get(other, len(HOUSE)) > floor[own]}
    assert not below, f"{path.name} imports {sorted(below)} from below its own line"


def test_the_town_knows_only_files_and_names():
    known = set().union(*(imports_of(path) for path in (ROOT / "data" / "townscape").glob("*.py")))
    assert {name for name in known if not name.startswith("townscape.")} <= {"sagelib.runs", "sagelib.places"}


@pytest.mark.parametrize(
    ("path", "forbidden"),
    [
        ("sagelib/graph.py", {"torch"}),
        ("sagelib/sampler.py", {"torch"}),
        ("sagelib/model.py", {"sagelib.places", "sagelib.images"}),
        ("sagelib/backbone.py", {"sagelib.places", "sagelib.images"}),
        *(
            (f"notebooks/workbench/figures/{name}", {"torch", "sagelib.model", "sagelib.train"})
            for name in FIGURES
        ),
    ],
)
def test_rooms_that_must_not_know_each_other(path, forbidden):
    tree = ast.parse((ROOT / path).read_text())
    top = {n.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for n in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not (imports_of(ROOT / path) | top) & forbidden


def test_the_commands_of_the_readme_exist():
    """Targets of make, modules, files of the checkout, and the parameters that papermill is given."""
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)|`make (\w[\w-]*)`", readme, re.M):
        assert re.search(rf"^{''.join(target)}:", makefile, re.M), target
    for name in re.findall(r"-m ((?:sagelib|workbench|townscape)\.\w+)", readme):
        assert "__main__" in Path(importlib.util.find_spec(name).origin).read_text(), name
    for name in re.findall(
        r"\b(?:notebooks|sagelib|tests|data/results)/[\w./-]*\.(?:ipynb|py|yaml|json|cfg|jpg)\b", readme
    ):
        assert (ROOT / name).exists(), name
    for notebook, options in re.findall(
        r"papermill (notebooks/\S+) (out\.ipynb(?:[^\n]*\\\n)*[^\n]*)", readme
    ):
        cells = json.loads((ROOT / notebook).read_text())["cells"]
        source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
        for name in re.findall(r"-[pr] (\w+)", options):
            assert re.search(rf"^{name}: ", source, re.M), f"{notebook} has no parameter {name}"


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """As it stands, in a folder that holds what it names; only the backbone is a small one of random
    weights."""
    for i in range(4):
        make_sets.write_picture(tmp_path / "holiday" / f"{i}.jpg", i)
    header, rows = ["file", "lat", "lon"], [[f"{i}.jpg", 48.137 + i / 1000, 11.575] for i in range(4)]
    make_sets.write_csv(tmp_path / "holiday" / "positions.csv", header, rows)
    make_sets.write_picture(tmp_path / "unknown.jpg", 2)
    small = functools.partial(model.build_model, "vit_small_patch14_dinov2", pretrained=False)
    monkeypatch.setattr(model, "build_model", lambda name, **options: small(**options))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert re.search(r"^0 +1 .*2\.jpg", capsys.readouterr().out, re.M), "the photograph itself comes first"


def test_the_commands_of_the_readme_have_the_options_that_it_names():
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    named = re.findall(r"python (-m [\w.]+|notebooks/\w+\.py)([^\n`]*)", readme)
    named += [("-m accelerate.commands.launch", o) for o in re.findall(r"accelerate launch (.*?) -m", readme)]
    options = {command: set() for command, _ in named}
    for command, given in named:
        options[command] |= set(re.findall(r" (--[\w-]+)", given.split("  #")[0]))
    assert {"-m sagelib.train", "-m workbench.audit", "notebooks/reproduce.py"} <= set(options)
    started = {
        command: subprocess.Popen(
            [sys.executable, *command.split(), "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for command in options
    }
    for command, process in started.items():
        said = process.communicate()[0]
        assert process.returncode == 0, command
        missing = [option for option in options[command] if option not in said]
        assert not missing, f"{command} has no option {missing}"
