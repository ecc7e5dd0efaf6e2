"""The key numbers of every notebook: record them, and compare those of a later pass with them, each within its tolerance.

Numbers that come out of training differ in their last digits between processors, and a rank that was decided by such a digit differs with
them; as text they cannot be compared. So each notebook gives its key numbers to its run (``run.finish``), ``make notebooks`` records them in
``expected.json``, and ``make test-notebooks`` compares those of the runs that its pass has just written::

    python notebooks/expected.py record  RUNS... notebooks/*.ipynb
    python notebooks/expected.py compare RUNS notebooks/*.ipynb

where RUNS is the folder that ``SAGE_RUNS`` named. Of several folders, each of a pass as on another processor, the first has the numbers, and
their spread over all says how far each may be off. A number that is missing, new or off is an error, and so is a figure that was not saved both
as PNG and as PDF.
"""

import fnmatch
import json
import math
import sys
from pathlib import Path

from sagelib.runs import Run, find_runs, write_json

RECORDED = Path(__file__).resolve().parent / "expected.json"

# (notebook, key, the least that a number may be off, in its own unit): the first line that fits counts. Other counts must be
# equal, and other numbers may be off by a thousandth of themselves. Three times the measured spread counts where that is more.
FLOORS = (
    ("02", "n_gained", 10),  # edges, after an epoch of training
    ("02", "n_lost", 10),
    ("02", "n_kept", 10),
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


def page_runs(folder: str | Path, notebook: str) -> list[Run]:
    """The runs that a notebook, named by its number, has written under `folder`, unfinished ones too."""
    return [
        run for run in find_runs(folder, "notebooks", finished=None) if run.name.startswith(f"{notebook}-")
    ]


def differences(recorded: dict, notebook: str, folder: str | Path) -> list[str]:
    """What a pass over one notebook has otherwise than `recorded`, one sentence each.

    Parameters
    ----------
    recorded : dict
        As `record` gives it.
    notebook : str
        Its number, such as ``"03"``.
    folder : path
        Runs of the pass.
    """
    runs = {run.name: run for run in page_runs(folder, notebook)}
    run = runs.get(recorded["run"])
    if run is None:
        return [f"{notebook}: no run named {recorded['run']} was written, but {', '.join(runs) or 'none'}"]
    if not run.finished:
        return [f"{notebook}: the run {run.name} was not finished, so it has no numbers"]
    found, sentences = run.metrics, []
    for key, value in recorded["numbers"].items():
        if key not in found:
            sentences.append(f"{notebook}: {key} is missing; {value:g} was recorded")
            continue
        off = abs(found[key] - value)
        allowed = recorded["tolerances"][key] if "tolerances" in recorded else floor(notebook, key, value)
        if not off <= allowed:
            sentences.append(
                f"{notebook}: {key} is {found[key]:.6g}; {value:.6g} was recorded, and {allowed:.3g} may be off"
            )
    sentences += [
        f"{notebook}: {key} was never recorded: make notebooks"
        for key in found
        if key not in recorded["numbers"]
    ]
    return sentences + [f"{notebook}: {what}" for what in unsaved_figures(run)]


def unsaved_figures(run: Run) -> list[str]:
    """Figures of a run that were not saved both as PNG and as PDF (a plotly one: as a page)."""
    figures = run.dir / "figures"
    names = {path.stem for path in figures.glob("*.p??")}
    if not names:
        return ["no figure was saved"]
    return [
        f"the figure {name} was saved as {', '.join(sorted(p.suffix for p in figures.glob(name + '.*')))}"
        for name in sorted(names)
        if not all((figures / (name + s)).exists() for s in (".png", ".pdf"))
        and not (figures / (name + ".html")).exists()
    ]


def record(folders: list[str], notebook: str) -> dict:
    """What a notebook has written under each of `folders`, as numbers and how far each may be off.

    Returns
    -------
    dict
        ``{"run": name, "numbers": {key: value}, "tolerances": {key: number}}``; the values are those of the first folder.
    """
    passes = [_finished_run(folder, notebook) for folder in folders]
    first, measured = passes[0], [run.metrics for run in passes]
    if len({(run.name, *sorted(run.metrics)) for run in passes}) > 1:
        raise ValueError(f"the passes over notebook {notebook} have other parameters or other numbers")
    spread = {key: max(m[key] for m in measured) - min(m[key] for m in measured) for key in first.metrics}
    allowed = {key: max(floor(notebook, key, first.metrics[key]), 3 * spread[key]) for key in spread}
    return {"run": first.name, "numbers": first.metrics, "tolerances": allowed}


def _finished_run(folder, notebook):
    runs = page_runs(folder, notebook)
    if len(runs) != 1 or not runs[0].finished:
        states = ", ".join(f"{run.name} ({run.manifest['status']})" for run in runs)
        raise ValueError(
            f"{folder} must hold one finished run of notebook {notebook}, and holds {states or 'none'}"
        )
    wrong = {key: value for key, value in runs[0].metrics.items() if not _is_number(value)}
    if wrong:
        raise ValueError(f"key numbers of notebook {notebook} must be finite numbers, got {wrong}")
    return runs[0]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) < 3 or arguments[0] not in ("record", "compare"):
        print(__doc__, file=sys.stderr)
        return 2
    what, *given = arguments
    paths = [path for path in given if path.endswith(".ipynb")]
    folders = given[: len(given) - len(paths)]
    if not paths or not folders or (what == "compare" and len(folders) > 1):
        print(__doc__, file=sys.stderr)
        return 2
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    notebooks = [Path(path).name.split("_")[0] for path in paths]
    if what == "record":
        known |= {notebook: record(folders, notebook) for notebook in notebooks}
        write_json(RECORDED, dict(sorted(known.items())))
        print(
            f"recorded {sum(len(known[n]['numbers']) for n in notebooks)} numbers of {len(notebooks)} notebooks in {RECORDED.name}"
        )
        return 0
    wrong = []
    for notebook in notebooks:
        if notebook in known:
            wrong += differences(known[notebook], notebook, folders[0])
        else:
            wrong.append(f"{notebook}: no numbers were ever recorded: make notebooks")
    if wrong:
        print("\n".join(["", "Key numbers that are not as recorded:", *wrong]), file=sys.stderr)
        return 1
    print(
        f"{sum(len(known[n]['numbers']) for n in notebooks)} key numbers of {len(notebooks)} notebooks lie within their tolerances"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
