"""Tables of evaluations beside published numbers, and the points of both for figures."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from sagelib import runs
from sagelib.evaluate import POOLINGS, Evaluation, published, training_run


def recall_arrays(
    evaluations: Iterable[Evaluation], models: Sequence[str], datasets: Sequence[str], *, k: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R@k in percent and the ends of its interval, (models, datasets) each; NaN where there is none."""
    arrays = np.full((3, len(models), len(datasets)), np.nan)
    for e in evaluations:
        if e.model in models and e.dataset in datasets:
            at = models.index(e.model), datasets.index(e.dataset)
            if np.isfinite(arrays[0][at]):
                raise ValueError(f"{e.model} on {e.dataset} has two evaluations: give one of them")
            arrays[:, *at] = e.recall.percent(k), *e.recall.interval(k)
    return tuple(arrays)


def trained_parameters(spec: str, roots: Iterable, model: Callable) -> int:
    """How many parameters were trained for a model of this name: 0 for a frozen one.

    Of a training run what its manifest says; of others those that work, with a head if there is one.
    """
    if spec == "pixels" or spec.partition(":")[0] in POOLINGS:
        return 0
    run = training_run(spec, roots)
    if run is not None:
        return int(run.metrics["trained_parameters"])
    live = {name: row[0] for name, row in model.parameter_report().items()}
    return live["trained, head off"] + live.get("InteractHead", 0)


def training_runs(models: Iterable[str], roots: Iterable, further: Iterable[str] = ()) -> dict[str, runs.Run]:
    """The finished training runs among `models`, by name, and those of `further`, which must be such runs."""
    found = {name: training_run(name, roots) for name in [*models, *further]}
    for name in further:
        if found[name] is None:
            folders = ", ".join(str(Path(root) / "train") for root in roots)
            raise ValueError(f"there is no finished training run {name!r} in {folders}")
    return {name: run for name, run in found.items() if run is not None}


def _published_points(dataset=None) -> pd.DataFrame:
    """SAGE's published recalls on a set, with a column label such as ``SAGE ViT-L, sorted``."""
    rows = published()
    rows = rows[(rows["method"] == "SAGE") & ((rows["dataset"] == dataset) | (dataset is None))]
    label = "SAGE " + rows["backbone"].str.replace("DINOv2 ", "") + ", " + rows["context"]
    return rows.assign(label=label)


def published_recalls(datasets: Sequence[str]) -> dict[str, np.ndarray]:
    """SAGE's published R@1 on these sets, at its largest descriptor, by label; NaN where there is none."""
    rows = _published_points()
    rows = rows[(rows["dim"] == rows["dim"].max()) & rows["dataset"].isin(datasets)]
    groups = rows.groupby("label", sort=False)
    return {label: g.set_index("dataset")["r1"].reindex(datasets).to_numpy(float) for label, g in groups}


def published_by_size(dataset: str) -> dict[str, tuple]:
    """(dimensions, R@1) of SAGE's published descriptors on a set, by label; may be empty."""
    groups = _published_points(dataset).sort_values("dim").groupby("label", sort=False)
    return {label: (g["dim"].tolist(), g["r1"].tolist()) for label, g in groups}


def published_by_parameters(dataset: str) -> dict[str, tuple[int, float]]:
    """(trained parameters, R@1) of SAGE's published models on a set, by label; may be empty."""
    counts = published("parameters").drop(columns="source")
    rows = _published_points(dataset).merge(counts, on=["method", "backbone", "dim", "context"])
    return {row.label: (row.trained, row.r1) for row in rows.sort_values("trained").itertuples()}


def chance_recall(n_database: int, n_positives: Sequence[int], k: int) -> float:
    """R@k in percent of a random ranking, on average: the mean of ``1 - C(n - p, k) / C(n, k)`` over queries.

    n references, of which p, one of `n_positives`, answer a query.
    """
    missed = hypergeom.pmf(0, n_database, np.asarray(n_positives), min(k, n_database))
    return 100 * float(np.mean(1 - missed))


def results_table(
    evaluations: Iterable[Evaluation], missing: Mapping[str, str] | None = None, *, beside: bool = True
) -> pd.DataFrame:
    """Each set's chance level, evaluations and, `beside` them, published numbers, each with its context.

    A set that is `missing` has a row that says why. Columns: dataset, method, backbone, dim, context, R@k in
    percent, its interval as text, hits@k, queries, references, without positive, preprocess, source.
    """
    rows, sets, ks = [], {}, (1, 5, 10)
    for e in evaluations:
        counts = {"queries": e.n_queries, "references": e.n_database}
        counts |= {"without positive": e.n_without_positive}
        if e.dataset not in sets:
            n_positives = e.rankings().groupby("query")["n_positives"].first()
            level = {f"R@{k}": chance_recall(e.n_database, n_positives, k) for k in ks}
            chance = {"method": "chance", "source": "what a random ranking reaches on average"}
            sets[e.dataset] = {"dataset": e.dataset, **chance, **level, **counts}
        row = {"dataset": e.dataset, "method": e.model, "dim": e.dim, "context": e.context, **counts}
        source = f"run {e.path.name}" + (f"; {e.warning}" if e.warning else "")
        row |= {"preprocess": e.preprocess, "source": source}
        for k in ks:
            row |= {f"R@{k}": e.recall.percent(k), f"hits@{k}": e.hits[k]}
            row[f"R@{k} 95 %"] = "{:.1f}-{:.1f}".format(*e.recall.interval(k))
        rows.append(row)
    gone = [{"dataset": d, "method": "not run", "source": why} for d, why in (missing or {}).items()]
    rows = [*sets.values(), *rows, *gone]
    names = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}
    if beside:
        others = published()[lambda t: t["dataset"].isin({row["dataset"] for row in rows})]
        rows += others.rename(columns=names).to_dict("records")
    columns = ["dataset", "method", "backbone", "dim", "context", *names.values()]
    columns += [f"R@{k} 95 %" for k in ks] + [f"hits@{k}" for k in ks]
    columns += ["queries", "references", "without positive", "preprocess", "source"]
    counted = ("dim", "queries", "references", "without positive", *(f"hits@{k}" for k in ks))
    types = dict.fromkeys(counted, "Int64") | dict.fromkeys(names.values(), float)
    order = {name: i for i, name in enumerate(dict.fromkeys(row["dataset"] for row in rows))}
    table = pd.DataFrame(rows, columns=columns).astype(types)
    return table.sort_values("dataset", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def _texts(table: pd.DataFrame) -> tuple[pd.DataFrame, list[bool]]:
    """The cells as text, percents with one decimal and missing values empty; which columns are numbers."""

    def text(value):
        if pd.isna(value):
            return ""
        return f"{value:.1f}" if isinstance(value, float) else " ".join(str(value).split())

    return table.astype(object).map(text), [pd.api.types.is_numeric_dtype(table[name]) for name in table]


def to_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    cells, numbers = _texts(table)
    rule = ["---:" if n else "---" for n in numbers]
    lines = [[*map(str, table.columns)], rule, *cells.to_numpy().tolist()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def to_latex(table: pd.DataFrame) -> str:
    """A table as a LaTeX tabular with booktabs' rules."""
    cells, numbers = _texts(table)
    style = cells.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    latex = style.to_latex(hrules=True, column_format="".join("r" if n else "l" for n in numbers))
    # Behind a line's end or a rule, a bracket would be read as its argument, and a star as its other form.
    return re.sub(r"^(?=[\[*])", "{}", latex, flags=re.M)


def write_table(table: pd.DataFrame, path) -> None:
    """Write a table as .csv (all digits), .md or .tex, whole or not at all."""
    writers = {
        ".csv": lambda t: t.to_csv(index=False, lineterminator="\n"),
        ".md": to_markdown,
        ".tex": to_latex,
    }
    ending = runs.check("the ending", Path(path).suffix, choices=tuple(writers))
    runs.write_text(path, writers[ending](table))
