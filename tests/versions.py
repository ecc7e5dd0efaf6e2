"""The tests at the lowest versions that ``pyproject.toml`` admits, and at the newest on the index.

    python tests/versions.py lowest newest --pythons 3.11 3.12 3.13 --tests tests/test_places.py

Each environment is made by uv (6 GB, and as much to download the first time), takes the lowest or newest
version of every direct dependency that has a wheel for that Python, runs the tests, and is removed. What ran
is written to ``tests/versions.md``: a line for each Python and kind, in the place of that of an earlier run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "versions.md"
NAMED = (
    "torch timm peft numpy pandas faiss-cpu scikit-learn pytorch-metric-learning papermill nbval pillow scipy"
).split()
HEAD = "# Versions that the tests ran on\n\n`make test-versions` writes a line for each Python and kind.\n\n"
HEAD += "| Python | versions | of | tests | result | day |\n|---|---|---|---|---|---|\n"
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
UNIT = ("-p", "no:cacheprovider", "-m", "not browser")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="+", choices=RESOLUTION)
    parser.add_argument("--pythons", nargs="+", default=["3.11", "3.12", "3.13"])
    parser.add_argument("--tests", nargs="+", default=["tests"])
    parser.add_argument(
        "--folder", type=Path, help="for the environments; default: one that is removed after"
    )
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sage-versions-"))
    try:
        runs = [(python, kind) for python in options.pythons for kind in options.kinds]
        results = [run(python, kind, folder.absolute(), options.tests) for python, kind in runs]
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return int(not all(results))


def run(python: str, kind: str, folder: Path, tests: list[str]) -> bool:
    """One environment: made, tested, written down, removed."""
    uv, here, started = folder / "uv" / "bin" / "uv", folder / f"{python}-{kind}", datetime.now(UTC)
    if not uv.exists():
        venv.create(folder / "uv", with_pip=True)
        subprocess.run([uv.with_name("pip"), "install", "--quiet", "uv"], check=True)
    environment = os.environ | {"UV_CACHE_DIR": str(folder / "cache"), "UV_LINK_MODE": "hardlink"}
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    environment["PYENV_VERSION"] = ":".join(path.name for path in pyenv.glob("3.*"))  # else they do not start
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    (folder / "requirements.txt").write_text("\n".join(project["dependencies"] + extras) + "\n")
    made = (
        ["venv", "--quiet", "--clear", "--seed", "--python", python, here],
        [
            *("pip", "install", "--quiet", "--python", here / "bin" / "python", "--only-binary", ":all:"),
            *("--resolution", RESOLUTION[kind], "-r", folder / "requirements.txt"),
        ],
    )
    for command in made:
        done = subprocess.run([uv, *command], env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            write(python, kind, "", "", "could not be made: " + " ".join(done.stderr.split())[:200], started)
            return False
    listed = subprocess.run(
        [uv, "pip", "freeze", "--python", here / "bin" / "python"], capture_output=True, text=True
    )
    versions = dict(line.split("==") for line in listed.stdout.split() if "==" in line)
    program = "import platform; print(platform.python_version())"
    exact = subprocess.run([here / "bin" / "python", "-c", program], capture_output=True, text=True).stdout
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "notebooks", "data", "tests"))
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    with tempfile.TemporaryDirectory() as runs:
        process = subprocess.Popen(
            [here / "bin" / "python", "-m", "pytest", *UNIT, *tests],
            **dict(cwd=ROOT, env=environment | {"SAGE_RUNS": runs}, stdout=subprocess.PIPE, text=True),
        )
        last = "did not finish"
        for line in process.stdout:
            sys.stdout.write(line)
            last = line.strip("= \n") if re.search(r"\d+ (passed|failed|error)", line) else last
    named = ", ".join(f"{name} {versions[name]}" for name in NAMED if name in versions)
    write(exact.strip(), kind, named, " ".join(tests), last, started)
    shutil.rmtree(here)
    return process.wait() == 0


def write(python: str, kind: str, named: str, tests: str, result: str, day: datetime) -> None:
    """Put a line into the table, in the place of an earlier one of this Python and kind."""
    lines = TABLE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines() if TABLE.exists() else []
    minor = ".".join(python.split(".")[:2])
    lines = [line for line in lines if not re.match(rf"\| {re.escape(minor)}[.\d]* \| {kind} ", line)]
    lines.append(f"| {python} | {kind} | {named} | {tests} | {result} | {day:%Y-%m-%d} |")
    TABLE.write_text(HEAD + "\n".join(sorted(lines)) + "\n", encoding="utf-8")
    print(lines[-1], flush=True)


if __name__ == "__main__":
    sys.exit(main())
