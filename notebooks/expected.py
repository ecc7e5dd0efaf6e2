"""The key numbers of every notebook: record them, and compare those of a later pass within tolerances.

Numbers that come out of training differ in their last digits between processors, and a rank that hangs on
such a digit differs with them. So each notebook gives its key numbers to its run (``run.finish``), ``make
notebooks`` records them in ``expected.json``, and ``make test-notebooks`` compares those of its pass::

    python notebooks/expected.py record  RUNS... notebooks/*.ipynb
    python notebooks/expected.py compare RUNS notebooks/*.ipynb

where RUNS is the folder that ``SAGE_RUNS`` named. Of several folders, each of a pass as on another
processor, the first has the numbers, and their spread over all says how far each may be off. A number that
is missing, new or off is an error, and so is a figure that was not saved both as PNG and as PDF.
"""

import fnmatch
import json
import math
import sys
from pathlib import Path

from sagelib.runs import Run, find_runs, write_json

RECORDED = Path(__file__).resolve().parent / "expected.json"

# (notebook, key, the least that a number may be off, in its own unit): the first line that fits counts. Other
# counts must be equal, other numbers within a thousandth. Three times the measured spread counts where more.
FLOORS = (
    ("00", "*/R@1", 1.7),  # points: 2 of 120 queries
    ("02", "chosen again", 0.1),  # a share, after an epoch of training
    ("02", "new graph, harder by", 0.02),  # a cosine
    ("03", "R@*", 2.5),  # points: 3 of 120 queries
    ("03", "loss*", 0.02),
    ("04", "*/aid", 0.002),  # distances of descriptors of length 1
    ("04", "*/ratio", 0.002),
    ("04", "*/nearest_is_same", 0.05),  # a share: 2 of 48 photographs
    ("05", "*/score", 0.002),  # a cosine
    ("05", "*", 0.001),  # shares of the pictures
    ("06", "*R@*", 1.7),  # points: 2 of 120 queries
    ("06", "*", 0.05),
    ("07", "*/points", 0.05),
)


def floor(notebook: str, key: str, value: float) -> float:
    """The least that the number `key` of a notebook may be off."""
    for number, pattern, allowed in FLOORS:
        if number == notebook and fnmatch.fnmatchcase(key, pattern):
            return allowed
    return 0 if isinstance(value, int) else abs(value) / 1000


def page_runs(folder: str | Path, notebook: str) -> dict[str, Run]:
    """By name the runs, unfinished ones too, that a notebook of that number has written under `folder`."""
    runs = find_runs(folder, "notebooks", finished=None)
    return {run.name: run for run in runs if run.name.startswith(f"{notebook}-")}


def differences(recorded: dict, notebook: str, folder: str | Path) -> list[str]:
    """What a pass over one notebook, with runs in `folder`, has otherwise than `record` gave: sentences."""
    runs = page_runs(folder, notebook)
    run = runs.get(recorded["run"])
    if run is None:
        return [f"{notebook}: no run named {recorded['run']} was written, but {', '.join(runs) or 'none'}"]
    if not run.finished:
        return [f"{notebook}: the run {run.name} was not finished, so it has no numbers"]
    sentences = []
    for key, value in recorded["numbers"].items():
        allowed = recorded.get("tolerances", {}).get(key, floor(notebook, key, value))
        if key not in run.metrics:
            sentences.append(f"{key} is missing; {value:g} was recorded")
        elif not abs(run.metrics[key] - value) <= allowed:
            words = f"{value:.6g} was recorded, and {allowed:.3g} may be off"
            sentences.append(f"{key} is {run.metrics[key]:.6g}; {words}")
    new = [key for key in run.metrics if key not in recorded["numbers"]]
    sentences += [f"{key} was never recorded: make notebooks" for key in new]
    return [f"{notebook}: {sentence}" for sentence in sentences + unsaved_figures(run)]


def unsaved_figures(run: Run) -> list[str]:
    """Figures of a run that were not saved both as PNG and as PDF (a plotly one: as a page)."""
    saved = {}
    for path in sorted((run.dir / "figures").iterdir() if (run.dir / "figures").exists() else ()):
        saved.setdefault(path.stem, []).append(path.suffix)
    drawn = {name: kinds for name, kinds in saved.items() if {".png", ".pdf"} & set(kinds)}
    lacking = {name: k for name, k in drawn.items() if not {".png", ".pdf"} <= set(k) and ".html" not in k}
    sentences = [f"the figure {name} was saved as {', '.join(kinds)}" for name, kinds in lacking.items()]
    return sentences if drawn else ["no figure was saved"]


def record(folders: list[str], notebook: str) -> dict:
    """What a notebook has written under each of `folders`, as numbers and how far each may be off.

    Returns
    -------
    dict
        ``{"run": name, "numbers": {key: value}, "tolerances": {key: number}}``, values of the first folder.
    """
    passes = [_finished_run(folder, notebook) for folder in folders]
    first, measured = passes[0], [run.metrics for run in passes]
    if len({(run.name, *sorted(run.metrics)) for run in passes}) > 1:
        raise ValueError(f"the passes over notebook {notebook} have other parameters or other numbers")
    spread = {key: max(m[key] for m in measured) - min(m[key] for m in measured) for key in first.metrics}
    allowed = {key: max(floor(notebook, key, first.metrics[key]), 3 * spread[key]) for key in spread}
    return {"run": first.name, "numbers": first.metrics, "tolerances": allowed}


def _finished_run(folder, notebook) -> Run:
    runs = list(page_runs(folder, notebook).values())
    if len(runs) != 1 or not runs[0].finished:
        states = ", ".join(f"{run.name} ({run.manifest['status']})" for run in runs)
        raise ValueError(
            f"{folder} must hold one finished run of notebook {notebook}, got {states or 'none'}"
        )
    numbers = runs[0].metrics
    wrong = {k: v for k, v in numbers.items() if not isinstance(v, int | float) or not math.isfinite(v)}
    if wrong:
        raise ValueError(f"key numbers of notebook {notebook} must be finite numbers, got {wrong}")
    return runs[0]


def main(arguments: list[str] | None = None) -> int:
    what, *given = (sys.argv[1:] if arguments is None else arguments) or [""]
    notebooks = [Path(path).name.split("_")[0] for path in given if path.endswith(".ipynb")]
    folders = given[: len(given) - len(notebooks)]
    usable = (what == "record" and folders) or (what == "compare" and len(folders) == 1)
    if not notebooks or not usable:
        print(__doc__, file=sys.stderr)
        return 2
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if what == "record":
        recorded |= {notebook: record(folders, notebook) for notebook in notebooks}
        write_json(RECORDED, dict(sorted(recorded.items())))
    elif missing := [notebook for notebook in notebooks if notebook not in recorded]:
        print(f"no numbers of {', '.join(missing)} were ever recorded: make notebooks", file=sys.stderr)
        return 1
    elif wrong := [words for n in notebooks for words in differences(recorded[n], n, folders[0])]:
        print("\n".join(["", "Key numbers that are not as recorded:", *wrong]), file=sys.stderr)
        return 1
    count = sum(len(recorded[notebook]["numbers"]) for notebook in notebooks)
    words = f"recorded in {RECORDED.name}" if what == "record" else "lie within their tolerances"
    print(f"{count} key numbers of {len(notebooks)} notebooks {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
