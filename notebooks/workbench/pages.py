"""What every page begins and ends with: checked parameters, and a run that takes its figures and numbers."""

import ast
import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython import get_ipython
from IPython.display import HTML, display

from sagelib.runs import UNFINISHED, Run, atomic_path, check, fingerprint, now, plain, runs_root, write_json

NOTEBOOKS = Path(__file__).resolve().parents[1]
# On a narrow page sentences break between words, and long names in the first columns of a table anywhere.
STYLE = """<style>.jp-OutputArea-output pre {word-break: normal; overflow-wrap: anywhere}
.jp-OutputArea-output tbody th, .jp-RenderedMarkdown td:nth-child(-n+2):not([align]) {
    overflow-wrap: anywhere; min-width: 6em}</style>"""
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}


def start_page(namespace: Mapping[str, Any], **allowed: float | Sequence | None) -> None:
    """Begin a page: relative paths start at ``notebooks``, parameters are what they are declared, and
    ``%%exercise`` begins a cell to be completed.

    `namespace` is the page's ``globals()``, whose annotated names are the parameters; `allowed` says of some
    of them the least value, or all values, or None where None may be. A ValueError says what is wrong.
    """
    if NOTEBOOKS.is_dir():
        os.chdir(NOTEBOOKS)
    if shell := get_ipython():
        shell.register_magic_function(exercise, "cell")
        display(HTML(STYLE))
    kinds = namespace.get("__annotations__", {})
    # papermill sets what it is given in a cell of its own, which begins with this comment.
    given = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")][-1:]
    unknown = [name for cell in given for name in re.findall(r"^(\w+) = ", cell, re.M) if name not in kinds]
    if unknown:
        hint = "(of a file for several pages, notebooks/reproduce.py gives each page its own)"
        raise ValueError(f"this page has no parameter {', '.join(unknown)}; it has {', '.join(kinds)} {hint}")
    for name, kind in kinds.items():
        value, limit = namespace.get(name), allowed.get(name)
        if value is None and name in allowed and limit is None:
            continue
        good = isinstance(value, (int, float) if kind is float else kind)
        if kind in KINDS and (not good or (isinstance(value, bool) and kind is not bool)):
            # papermill's -p makes a number of what looks like one.
            hint = f": on papermill's command line write -r {name} {value}" if kind is str else ""
            raise ValueError(f"{name} must be {KINDS[kind]}, got {value!r}{hint}")
        if isinstance(limit, int | float) and not value >= limit:
            raise ValueError(f"{name} must be at least {limit}, got {value!r}")
        if isinstance(limit, Sequence):
            check(name, value, choices=limit)


def exercise(name: str, cell: str) -> None:
    """The cell magic ``%%exercise``: run a cell once its reader has put something for every ``...`` in it."""
    if any(getattr(node, "value", None) is ... for node in ast.walk(ast.parse(cell))):
        print(f"Exercise {name} is open: put your own for each ... in this cell, and run it again.")
    else:
        get_ipython().ex(cell)


def read_list(text: str, what: str, kind: type = str, *, least: int = 1) -> list:
    """The values of the parameter `what`, separated by commas outside [brackets]; enough, none twice."""
    try:
        values = [kind(part) for part in map(str.strip, re.split(r",(?![^[]*\])", text)) if part]
    except ValueError:
        raise ValueError(f"{what} is {text!r}: give whole numbers separated by commas") from None
    if len(values) < least:
        raise ValueError(f"{what} is {text!r}: give at least one value; several are separated by commas")
    if len(set(values)) != len(values):
        raise ValueError(f"{what} is {text!r}: it names one of them twice")
    return values


class Page(Run):
    """The run of a page, which keeps its figures."""

    def save_figure(self, figure: Any, name: str, numbers: Any = None) -> list[Path]:
        """Save a figure under ``figures/``, and the numbers it shows, a table or plain values, beside it.

        One of matplotlib becomes ``.png`` and ``.pdf``; one of plotly a page that needs no network, and a
        ``.png`` where the machine has the browser that this takes. Returns the files written.
        """
        written = []

        def save(ending: str, write) -> None:
            with atomic_path(self.path("figures", name + ending)) as temporary:
                write(temporary)
            written.append(self.path("figures", name + ending))

        if hasattr(figure, "savefig"):
            for ending in (".png", ".pdf"):
                save(ending, lambda path: figure.savefig(path, dpi=150, bbox_inches="tight"))
        else:
            save(".html", lambda path: figure.write_html(path, include_plotlyjs=True))
            with contextlib.suppress(Exception):
                save(".png", lambda path: figure.write_image(path, scale=2))
        if hasattr(numbers, "to_csv"):
            save(".csv", lambda path: numbers.to_csv(path, index=False))
        elif numbers is not None:
            save(".json", lambda path: write_json(path, numbers))
        return written


def open_notebook_run(folder: str | os.PathLike, notebook: str, subject: str, **parameters: Any) -> Page:
    """The run ``<runs>/notebooks/<notebook>-<subject>-<hash>`` of a page, begun afresh each time.

    `folder` is as for `runs_root`; the hash is of `parameters`, what the figures depend on.
    """
    name = f"{notebook}-{subject.replace('/', '_')}-{fingerprint(plain(parameters))[:6]}"
    page = Page.open(runs_root(folder), "notebooks", name, parameters)
    page.manifest |= {"started": now(), **UNFINISHED}
    page.save_manifest()
    return page
