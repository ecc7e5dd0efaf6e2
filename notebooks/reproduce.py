"""Run the ordered notebooks headlessly with one file of parameters, and say where everything is.

``make reproduce`` calls this; without make: ``python notebooks/reproduce.py``. It is papermill in a loop:
each notebook is given those parameters of the file that it declares in its ``parameters`` cell.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import pandas
import papermill

from sagelib.runs import runs_root
from sagelib.train import read_parameters

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--parameters", type=Path, default=HERE / "params" / "town.yaml", help="YAML of parameters")
    option("--out", type=Path, default=HERE.parent / "data" / "runs" / "reproduce", help="executed notebooks")
    option("--data", type=Path, help="folder of the data sets, instead of the file's data_folder")
    option("--only", nargs="+", help="first digits of the notebooks to run, as in 01 06")
    options = parser.parse_args(arguments)

    if not options.parameters.is_file():
        parser.error(f"there is no file {options.parameters}; the shipped ones are in {HERE / 'params'}")
    try:
        values = read_parameters(options.parameters)
    except ValueError as error:
        parser.error(str(error))
    if options.data is not None:
        if not options.data.is_dir():
            parser.error(f"--data: there is no folder {options.data}")
        values["data_folder"] = str(options.data.resolve())
    notebooks = {path.name[:2]: path for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb"))}
    declared = {number: set(papermill.inspect_notebook(str(path))) for number, path in notebooks.items()}
    if unknown := set(values).difference(*declared.values()):
        parser.error(f"{options.parameters}: no notebook has a parameter named {', '.join(sorted(unknown))}")
    chosen = sorted(set(options.only or notebooks))
    if missing := set(chosen) - set(notebooks):
        parser.error(f"--only: no notebook starts with {', '.join(sorted(missing))}")

    os.environ.setdefault("MPLBACKEND", "Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    pages = (HERE / runs_root(values.get("runs_folder", ""))).resolve() / "notebooks"
    before = {path: path.stat().st_mtime_ns for path in pages.glob("*/*")}
    began = time.monotonic()
    for i, number in enumerate(chosen, 1):
        notebook, start = notebooks[number], time.monotonic()
        print(f"[{i}/{len(chosen)}] {notebook.name} ...", flush=True)
        try:
            papermill.execute_notebook(
                str(notebook),
                str(options.out / notebook.name),
                parameters={name: value for name, value in values.items() if name in declared[number]},
                cwd=str(HERE),
                kernel_name="python3",
                progress_bar=sys.stderr.isatty(),
            )
        except papermill.PapermillExecutionError as error:
            print(
                f"{notebook.name} stopped in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
                f"the notebook up to there: {options.out / notebook.name}",
                file=sys.stderr,
            )
            return 1
        except OSError as error:  # of a full disk
            print(f"{options.out / notebook.name}: {error}", file=sys.stderr)
            return 1
        print(f"    done in {time.monotonic() - start:.0f} s", flush=True)

    print(f"\nAll {len(chosen)} notebooks ran in {(time.monotonic() - began) / 60:.1f} min.")
    print(f"executed notebooks  {options.out.resolve()}")
    made = [path for path in sorted(pages.glob("*/*")) if path.stat().st_mtime_ns != before.get(path)]
    for folder in (path for path in made if path.name == "figures"):
        print(f"figures             {folder}")
    for path in (path for path in made if path.name == "recall_table.csv"):
        print(f"recall table        {path.with_suffix('.md')}\n")
        table = pandas.read_csv(path).dropna(subset=["queries"]).astype({"queries": int})
        columns = ["dataset", "method", "context", "R@1", "R@1 95 %", "R@5", "R@10", "queries"]
        print(table[columns].to_string(index=False, na_rep="", float_format="{:.1f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
