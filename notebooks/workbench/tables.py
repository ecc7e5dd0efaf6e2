"""Evaluations that are there, tables of them beside published numbers, and what a difference is worth."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown
from scipy import optimize, stats

from sagelib import runs
from sagelib.describe import Context, describe_callable, preprocess_of
from sagelib.evaluate import POOLINGS, STAGE, Evaluation, context_of, evaluate, published, training_run
from sagelib.places import Places, available, open_set, parse_name
from sagelib.retrieval import Recall, precision_recall, resampled_means


# ---------- finished runs
def evaluate_many(
    model: Callable, data_root, names: Iterable[str] | str | None, root, *, positives=None, **options
) -> tuple[list[Evaluation], dict[str, str]]:
    """Evaluate one model on several sets of a folder: benchmarks or folders, or None for all that are there.

    Returns the evaluations, and of each set that is not there or cannot be read the sentence that says why.
    Raises the last error where sets are there and none could be evaluated. `positives` is that of `open_set`,
    other options are those of `evaluate`.
    """
    if names is None:
        table = available(data_root)
        names = list(table.loc[table["present"], "name"])
    evaluations, missing, failed = [], {}, None
    for name in [names] if isinstance(names, str) else names:
        try:  # pictures that do not decode are found while describing
            how = {"positives": positives, "on_error": options.get("on_error", "raise")}
            test_set = open_set(data_root, name, **how, check_pictures=False)
        except (FileNotFoundError, ValueError) as error:
            missing[name] = str(error)
            continue
        try:
            evaluations.append(evaluate(model, test_set, root, **options))
        except (OSError, ValueError, MemoryError) as error:
            missing[name], failed = str(error), error
    if failed is not None and not evaluations:
        raise failed
    return evaluations, missing


def read_evaluations(
    root,
    datasets: Iterable[str],
    models: Iterable[str],
    *,
    context: str | Context,
    preprocess: Callable,
    positives: str = "",
) -> list[Evaluation]:
    """The finished evaluations in a folder of runs, of two alike the last, by model and then by dataset.

    Of models by name, as `open_models` gives them, what one's name says of its pictures goes first.
    With `positives`, the text of a rule or the name of a file, only those that counted by it.
    """

    def age(run) -> tuple[str, int]:  # to the second, and within one by the file's own time
        return run.manifest["finished"], (run.dir / runs.MANIFEST).stat().st_mtime_ns

    latest = sorted(runs.find_runs(root, STAGE), key=age)
    evaluations = [e for e in (Evaluation.load(run.dir) for run in latest) if positives in ("", e.positives)]
    by_key = {(e.model, e.dataset, e.context, e.preprocess): e for e in evaluations}
    models = models if isinstance(models, Mapping) else dict.fromkeys(models)
    looks = {name: describe_callable(preprocess_of(model, preprocess)) for name, model in models.items()}
    keys = [(name, d, str(context_of(context, d)), look) for name, look in looks.items() for d in datasets]
    return [by_key[key] for key in keys if key in by_key]


def by_folder(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """The evaluations, each followed by those of its folders of queries alone, where a set has several.

    The dataset of such a part is called ``<set>/queries_night``; its run and other facts are the whole's.
    """
    parts = []
    for whole in evaluations:
        firsts = whole.rankings().drop_duplicates("query")
        folders = firsts["query_path"].str.partition("/")[0]
        several = folders.nunique() > 1 and folders.str.startswith("queries").all()
        parts.append(whole)
        for folder in sorted(set(folders)) if several else ():
            rows = firsts[folders == folder]
            counts = {"n_queries": len(rows), "n_without_positive": int((rows["n_positives"] == 0).sum())}
            part = Recall.from_ranks(whole.per_query_rank[rows["query"]], ks=tuple(whole.hits))
            counts |= {"hits": part.hits, "per_query_rank": part.per_query_rank}
            counts |= {"dataset": f"{whole.dataset}/{folder}", "folder": f"{folder}/"}
            parts.append(dataclasses.replace(whole, **counts))
    return parts


def answer_or_refuse(evaluations: Iterable[Evaluation]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """How well the distance of the first answer tells that a place is not in the map.

    A row each evaluation: the area under its curve (AUC, by trapezoids from recall 0 and precision 1); the
    highest recall without a wrong answer (R@100P, in percent), and the distance up to which that holds. And
    each evaluation's `precision_recall`, by model and dataset.
    """
    from sklearn.metrics import auc  # not above: it draws from `random` when it is imported

    rows, curves = [], {}
    for e in evaluations:
        firsts = e.rankings().drop_duplicates("query")
        curve = precision_recall(firsts["distance"], firsts["positive"], firsts["n_positives"])
        sure = curve[curve["precision"] == 1].tail(1)
        area = auc(np.append(0, curve["recall"]), np.append(1, curve["precision"]))
        row = {"dataset": e.dataset, "method": e.model, "context": e.context, "queries": e.n_queries}
        row |= {"without positive": e.n_without_positive, "AUC": area, "R@100P": 100 * sure["recall"].sum()}
        rows.append(row | {"up to": sure["threshold"].max()})
        curves[f"{e.model}, {e.dataset}"] = curve
    return pd.DataFrame(rows), curves


def recall_arrays(evaluations: Iterable[Evaluation], models: Sequence[str], datasets: Sequence[str]) -> tuple:
    """R@1 in percent and the ends of its interval, (models, datasets) each; NaN where there is none."""
    rows = [(e.model, e.dataset, e.recall.percent(1), *e.recall.interval(1)) for e in evaluations]
    table = pd.DataFrame(rows, columns=["model", "dataset", "recall", "low", "high"])
    wide = table.pivot(index="model", columns="dataset")
    arrays = (wide[name].reindex(index=models, columns=datasets) for name in ("recall", "low", "high"))
    return tuple(array.to_numpy(float) for array in arrays)


def trained_parameters(spec: str, roots: Iterable, model: Callable) -> int:
    """How many parameters were trained for a model of this name: 0 for a frozen one.

    Of a training run what its manifest says; of others those that work, with a head if there is one; of
    somebody else's network what its code leaves open to training.
    """
    if spec == "pixels" or spec.partition(":")[0] in POOLINGS:
        return 0
    run = training_run(spec, roots)
    if run is not None:
        return int(run.metrics["trained_parameters"])
    if not hasattr(model, "parameter_report"):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    live = {name: row[0] for name, row in model.parameter_report().items()}
    return live["trained, head off"] + live.get("InteractHead", 0)


# ---------- what SAGE's authors published
def _published_points() -> pd.DataFrame:
    """The published recalls of SAGE, with a column label such as ``SAGE ViT-L, sorted``."""
    rows = published().query("method == 'SAGE'")
    label = "SAGE " + rows["backbone"].str.replace("DINOv2 ", "") + ", " + rows["context"]
    return rows.assign(label=label)


def published_recalls(datasets: Sequence[str]) -> dict[str, np.ndarray]:
    """R@1 on these sets, at the largest descriptor, by label; NaN where there is none."""
    rows = _published_points()
    rows = rows[(rows["dim"] == rows["dim"].max()) & rows["dataset"].isin(datasets)]
    groups = rows.groupby("label", sort=False)
    return {label: g.set_index("dataset")["r1"].reindex(datasets).to_numpy(float) for label, g in groups}


def published_by_size(dataset: str) -> dict[str, tuple]:
    """(dimensions, R@1) of the descriptors on a set, by label; may be empty."""
    rows = _published_points().query("dataset == @dataset").sort_values("dim")
    return {label: (g["dim"].tolist(), g["r1"].tolist()) for label, g in rows.groupby("label", sort=False)}


def published_by_parameters(dataset: str) -> dict[str, tuple[int, float]]:
    """(trained parameters, R@1) of the models on a set, by label; may be empty."""
    counts = published("parameters").drop(columns="source")
    rows = _published_points().query("dataset == @dataset")
    rows = rows.merge(counts, on=["method", "backbone", "dim", "context"]).sort_values("trained")
    return {row.label: (row.trained, row.r1) for row in rows.itertuples()}


# ---------- the table of results
def chance_recall(n_database: int, n_positives: Sequence[int], k: int) -> float:
    """R@k in percent of a random ranking, on average: the mean of ``1 - C(n - p, k) / C(n, k)`` over queries.

    n references, of which p, one of `n_positives`, answer a query.
    """
    missed = stats.hypergeom.pmf(0, n_database, np.asarray(n_positives), min(k, n_database))
    return 100 * float(np.mean(1 - missed))


def results_table(
    evaluations: Iterable[Evaluation], missing: Mapping[str, str] | None = None, *, beside: bool = True
) -> pd.DataFrame:
    """Each set's chance level, evaluations and, `beside` them, published numbers, each with its context.

    A set with several folders of queries has rows for each of them, see `by_folder`; a set that is `missing`
    has one that says why. Columns: dataset, method, backbone, dim, context, R@k in percent, its interval as
    text, hits@k, queries, references, without positive, positives, preprocess, source.
    """
    rows, chance, ks = [], {}, (1, 5, 10)
    recalls, intervals, hits = ([form.format(k) for k in ks] for form in ("R@{}", "R@{} 95 %", "hits@{}"))
    for e in by_folder(evaluations):
        counts = {
            "queries": e.n_queries,
            "references": e.n_database,
            "without positive": e.n_without_positive,
        }
        row = {"dataset": e.dataset, **counts, "positives": e.positives}
        if (e.dataset, e.data_fingerprint) not in chance:
            n_positives = e.rankings().groupby("query")["n_positives"].first()
            level = {f"R@{k}": chance_recall(e.n_database, n_positives, k) for k in ks}
            source = "what a random ranking reaches on average"
            chance[e.dataset, e.data_fingerprint] = row | {"method": "chance", "source": source} | level
        source = f"run {e.path.name}" + (f"; {e.warning}" if e.warning else "")
        row |= {"method": e.model, "dim": e.dim, "context": e.context, "preprocess": e.preprocess}
        for k in ks:
            row |= {f"R@{k}": e.recall.percent(k), f"hits@{k}": e.hits[k]}
            row[f"R@{k} 95 %"] = "{:.1f}-{:.1f}".format(*e.recall.interval(k))
        rows.append(row | {"source": source})
    rows = [*chance.values(), *rows]
    rows += [{"dataset": d, "method": "not run", "source": why} for d, why in (missing or {}).items()]
    order = {name: i for i, name in enumerate(dict.fromkeys(row["dataset"] for row in rows))}
    if beside:
        others = published()[lambda table: table["dataset"].isin(order)]
        rows += others.rename(columns={f"r{k}": f"R@{k}" for k in ks}).to_dict("records")
    counted = ["queries", "references", "without positive"]
    columns = ["dataset", "method", "backbone", "dim", "context", *recalls, *intervals, *hits, *counted]
    types = dict.fromkeys(["dim", *hits, *counted], "Int64") | dict.fromkeys(recalls, float)
    table = pd.DataFrame(rows, columns=[*columns, "positives", "preprocess", "source"]).astype(types)
    return table.sort_values("dataset", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def for_print(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of `results_table` that a reader compares, each recall with its interval in one cell."""
    backbone = (", " + table["backbone"].astype("string")).fillna("")
    table = table.assign(method=table["method"] + backbone)
    recalls = {}
    for k in (1, 5, 10):
        ends = " [" + table[f"R@{k} 95 %"].astype("string").str.replace("-", ", ") + "]"
        recalls[f"R@{k} [95 %]"] = table[f"R@{k}"].map("{:.1f}".format, na_action="ignore") + ends.fillna("")
    return table[["dataset", "method", "dim", "context"]].assign(**recalls, queries=table["queries"])


def _texts(table: pd.DataFrame) -> tuple[pd.DataFrame, list[bool]]:
    """The cells as text, percents with one decimal and missing values empty; which columns are numbers."""

    def text(value):
        if pd.isna(value):
            return ""
        return f"{value:.1f}" if isinstance(value, float) else " ".join(str(value).split())

    cells = table.astype(object).map(text)
    written = cells.apply(lambda c: c.str.fullmatch(r"((< )?[+-]?[\d.,]+( \[.+\])?)?").all() and c.any())
    return cells, [pd.api.types.is_numeric_dtype(table[name]) or bool(written[name]) for name in table]


def to_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, in which a cell is text and no HTML."""
    cells, numbers = _texts(table)
    rule = ["---:" if n else "---" for n in numbers]
    lines = [[*map(str, table.columns)], rule, *cells.to_numpy().tolist()]
    lines = [[escape(cell, False).replace("|", "\\|") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def show(table: pd.DataFrame) -> Markdown:
    """A table as a page shows it: however narrow the page, the ends of an interval stay on one line."""
    return Markdown(re.sub(r"\[[^][]+\]", lambda found: found[0].replace(" ", "\u00a0"), to_markdown(table)))


def to_latex(table: pd.DataFrame, caption: str | None = None) -> str:
    """A table as a LaTeX tabular with booktabs' rules, and with a caption as a float."""
    cells, numbers = _texts(table)
    style = cells.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    columns, place = "".join("r" if n else "l" for n in numbers), "t" if caption else None
    placed = {"caption": caption, "position": place, "position_float": place and "centering"}
    latex = style.to_latex(hrules=True, column_format=columns, **placed)
    # Behind a line's end or a rule, a bracket would be read as its argument, and a star as its other form.
    return re.sub(r"^(?=[\[*])", "{}", latex, flags=re.M)


def write_predictions(rankings: pd.DataFrame, path) -> None:
    """Write what ``Evaluation.rankings()`` or `sagelib.evaluate.predict` gives: .csv, or keys alone as .txt.

    That is the form of the Mapillary SLS challenge: a line for each query, its key and those of its ranked
    references, with spaces between. A key is the picture's id in an ``@...@`` name, else the file's name
    without its ending.
    """
    if runs.check("the ending", Path(path).suffix, choices=(".csv", ".txt")) == ".csv":
        runs.write_text(path, rankings.to_csv(index=False, lineterminator="\n"))
        return
    keys = {}
    for files in (rankings[f"{side}_path"].drop_duplicates() for side in ("query", "reference")):
        names = files.map(Path)
        key = names.map(lambda file: file.name[0] == "@" and parse_name(file)["pano_id"] or file.stem)
        if len(wrong := files[key.duplicated(keep=False) | key.str.contains(r"\s")]):
            raise ValueError(f"{wrong.iloc[0]}: its key has a space or is another's too: no line can name it")
        keys |= dict(zip(files, key, strict=True))
    ranked = rankings.sort_values("rank", kind="stable").groupby("query_path", sort=False)["reference_path"]
    lines = (" ".join(keys[path] for path in (query, *found)) + "\n" for query, found in ranked)
    runs.write_text(path, "".join(lines))


def write_table(table: pd.DataFrame, path, caption: str | None = None) -> None:
    """Write a table as .csv (all digits), .md or .tex (with a caption), whole or not at all."""
    ending = runs.check("the ending", Path(path).suffix, choices=(".csv", ".md", ".tex"))
    csv = table.to_csv(index=False, lineterminator="\n")
    runs.write_text(path, {".csv": csv, ".md": to_markdown(table), ".tex": to_latex(table, caption)}[ending])


# ---------- what a difference is worth
def query_places(queries: Places) -> np.ndarray:
    """The place (n,) of each query, for resampling by places: its label, or else its cluster within 25 m.

    A query without a position is a place of its own.
    """
    labels = queries.labels() if (queries.place >= 0).all() else queries.with_clusters(25.0).place
    return np.where(labels < 0, labels.max(initial=0) + np.cumsum(labels < 0), labels)


def bootstrap_mean(values, seed: int = 0, *, groups=None) -> tuple[float, float, float]:
    """Mean of finite values (n,), one a query, with its 95 % percentile interval: (mean, low, high).

    Queries, or whole `groups` of them, are resampled as in `sagelib.retrieval.paired_bootstrap`.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and of shape (n > 0,), got shape {values.shape}")
    resampled = resampled_means(values, np.unique(values), runs.rng(seed, "bootstrap_mean"), 2_000, groups)
    return (float(values.mean()), *np.quantile(resampled, [0.025, 0.975]).tolist())


def minimal_detectable_difference(n_queries: int, discordant: float) -> float:
    """The smallest difference in R@k, in percentage points, that so many queries show with 80 % power.

    Solves Connor's sample size for paired proportions, ``n = ((z_a sqrt(psi) + z_b sqrt(psi - d^2)) / d)^2``,
    for d (Biometrics 1987); psi is `discordant`, the share of queries that only one of two models hits, z_a
    belongs to the two-sided level of 5 %. NaN where not even d = psi would be found.
    """
    psi, (z_a, z_b) = runs.check("discordant", discordant, 0, 1), stats.norm.ppf([0.975, 0.8])

    def surplus(d):
        return np.sqrt(n_queries) * d - z_a * np.sqrt(psi) - z_b * np.sqrt(max(psi - d * d, 0))

    return 100 * optimize.brentq(surplus, 0, psi) if psi and surplus(psi) >= 0 else float("nan")


def verdict(
    difference, one: str, other: str, *, verb="finds", unit="points", words=("more", "less"), digits=1
):
    """One sentence on a difference: its size and interval, or what a section of a page could not have seen.

    `difference`, of `one` less `other`, is a `sagelib.retrieval.Difference` or its (value, low, high). An
    interval without zero is told with `verb`, `unit` and one of the `words`. One with zero tells the
    smallest difference that would be shown with 80 % power: 2.8 standard errors, where the interval has 3.9.
    """
    if not isinstance(difference, tuple):
        difference = difference.points, difference.low, difference.high
    value, low, high = difference
    if low <= 0 <= high:
        unseen = (high - low) / 2 * (1 + stats.norm.ppf(0.8) / stats.norm.ppf(0.975))
        value, low, high = (round(end, digits) + 0.0 for end in (value, low, high))  # not -0
        found = f"{value:+.{digits}f} {unit} [{low:+.{digits}f}, {high:+.{digits}f}]"
        power = f"; one of less than about {unseen:.{digits}f} would mostly go unseen" if unseen else ""
        return f"No difference between {one} and {other} is shown: {found}{power}."
    ends = "{:.{d}f}, {:.{d}f}".format(*sorted((abs(low), abs(high))), d=digits)
    return f"{one} {verb} {abs(value):.{digits}f} {unit} [{ends}] {words[int(value < 0)]} than {other}."
