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
import yaml

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parameters", type=Path, default=HERE / "params" / "town.yaml", help="YAML of parameters"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "data" / "runs" / "reproduce", help="executed notebooks"
    )
    parser.add_argument(
        "--data", type=Path, default=None, help="folder of the data sets, instead of the file's data_folder"
    )
    parser.add_argument(
        "--only", nargs="*", default=None, help="first digits of the notebooks to run, as in 01 06"
    )
    options = parser.parse_args(arguments)

    if not options.parameters.is_file():
        parser.error(
            f"there is no parameter file {options.parameters}; the shipped ones are in {HERE / 'params'}"
        )
    values = yaml.safe_load(options.parameters.read_text()) or {}
    if options.data is not None:
        if not options.data.is_dir():
            parser.error(f"--data: there is no folder {options.data}")
        values["data_folder"] = str(options.data.resolve())
    notebooks = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    declared = {n: set(papermill.inspect_notebook(str(n))) for n in notebooks}
    unknown = set(values) - set().union(*declared.values())
    if unknown:
        parser.error(f"{options.parameters}: no notebook has a parameter named {', '.join(sorted(unknown))}")
    if options.only is not None:
        missing = set(options.only) - {n.name.split("_")[0] for n in notebooks}
        if missing or not options.only:
            parser.error(f"--only: no notebook starts with {', '.join(sorted(missing)) or 'nothing'}")
        notebooks = [n for n in notebooks if n.name.split("_")[0] in options.only]

    os.environ.setdefault("MPLBACKEND", "Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    began, lines = time.time(), []
    for number, notebook in enumerate(notebooks, 1):
        start = time.time()
        print(f"[{number}/{len(notebooks)}] {notebook.name} ...", flush=True)
        try:
            papermill.execute_notebook(
                str(notebook),
                str(options.out / notebook.name),
                parameters={k: v for k, v in values.items() if k in declared[notebook]},
                cwd=str(HERE),
                kernel_name="python3",
                progress_bar=sys.stderr.isatty(),
            )
        except papermill.PapermillExecutionError as error:
            print(
                f"{notebook.name} stopped in cell {error.exec_count}: {error.ename}: {error.evalue}",
                file=sys.stderr,
            )
            print(f"the notebook up to there: {options.out / notebook.name}", file=sys.stderr)
            return 1
        lines.append((notebook.name, time.time() - start))
        print(f"    done in {lines[-1][1]:.0f} s", flush=True)

    where = options.out.resolve()
    print(f"\nAll {len(lines)} notebooks ran in {(time.time() - began) / 60:.1f} min.")
    print(f"executed notebooks  {where}")
    runs = Path(
        values.get("runs_folder") or os.environ.get("SAGE_RUNS") or HERE.parent / "data" / "runs"
    ).resolve()
    newest = sorted(runs.glob("notebooks/*/figures"), key=lambda p: p.stat().st_mtime)
    for folder in newest[-len(lines) :]:
        print(f"figures             {folder}")
    for table in sorted(runs.glob("notebooks/*/recall_table.csv"), key=lambda p: p.stat().st_mtime)[-1:]:
        print(f"recall table        {table.with_suffix('.md')}\n")
        measured = pandas.read_csv(table).dropna(subset=["queries"])
        told = ["dataset", "method", "context", "R@1", "R@1 95 %", "R@5", "R@10", "queries"]
        print(
            measured[told]
            .astype({"queries": int})
            .to_string(index=False, na_rep="", float_format="{:.1f}".format)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
