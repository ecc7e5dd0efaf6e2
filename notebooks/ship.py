"""Make the small set of finished runs that comes with the workbench, in ``data/results``: ``make results``.

Trainings on the town with one file of parameters, SAGE and two comparators, and their evaluations on its
test part; SAGE once more with the graph made once, for what that costs. Only small files are kept: manifests,
logs, the best weights of the trained parts, results and tables. With ``--photographs FOLDER`` the same for
street photographs that are no part of the workbench; their weights are not kept.
"""

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pandas
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from sagelib import evaluate, runs
from sagelib.images import Preprocess
from sagelib.places import open_set, open_training_set
from sagelib.train import TrainConfig, open_run, train
from townscape.folder import ensure_town
from workbench import figures, tables
from workbench.grids import keep

HERE = Path(__file__).resolve().parent
DATA, RUNS, RESULTS = HERE.parent / "data", runs.runs_root(), HERE.parent / "data" / "results"

CELLS = {"channels": 128, "probes": 16, "token_dim": 256, "hidden": 512, "cells": 2}
METHODS = {
    "sage": {},
    "sage-one-cell": {"aggregator_options": {**CELLS, "probes": 64, "cells": 1, "standardise": True}},
    "cfp": {"aggregator_options": {**CELLS, "alpha": None}},
    "salad": {
        "aggregator": "salad",
        "aggregator_options": {"clusters": 64, "channels": 128, "token_dim": 256},
        "data_init": None,
    },
    "sage-static": {"schedule": "static"},
}
WITHOUT_WEIGHTS = ("sage-one-cell", "sage-static", "sf-streets")  # kept for their results and logs
SMALL = "tf_efficientnet_lite2"
FROZEN = ("pixels", f"gem2x2:{SMALL}:random", f"gem:{SMALL}", f"gem2x2:{SMALL}")


def train_and_keep(methods: dict[str, dict], folder: Path, data: Path) -> dict:
    """Train on the set `data` unless that is done, keep what is small in `folder`, return the models.

    Weights are kept in half precision, and the models that are returned have these.
    """
    mined = open_training_set(data.parent, data.name)
    validation = open_set(data.parent, data.name, split="val")
    models, trained = {}, []
    for name, values in methods.items():
        config = TrainConfig.from_mapping({k: v for k, v in values.items() if k in TrainConfig.field_names()})
        trained.append(open_run(RUNS, name, config, mined=mined, validation=validation))
        models[name] = train(config, trained[-1], mined=mined, validation=validation).model
    keep([run.dir for run in trained], folder / "train", ("manifest.json", "log.jsonl", "best/*"))
    for name, model in models.items():
        best = folder / "train" / name / "best"
        if name in WITHOUT_WEIGHTS:
            shutil.rmtree(best)
            continue
        with safe_open(best / "trainable.safetensors", "pt") as file:
            half = {key: file.get_tensor(key).half() for key in file.keys()}
            save_file(half, best / "trainable.safetensors", metadata=file.metadata())
        model.load_trainable_state_dict(half)
    return models


def measure_and_keep(models: dict, sets: list, values: dict, folder: Path, name: str) -> None:
    """Measure models on sets; results, tables and differences to the frozen backbone go into `folder`."""
    look = Preprocess(values["validation_size"], mode=values["preprocess"])
    pairs = [(test, model) for test in sets for model in models]
    results = [evaluate.evaluate(models[m], test, RUNS, model_name=m, preprocess=look) for test, m in pairs]
    kept = ("manifest.json", "result.json", "ranks.npy")
    keep([result.path for result in results], folder / "evaluate", kept)
    table = tables.results_table(results, beside=False)
    tables.write_table(table, folder / f"{name}.csv")
    tables.write_table(tables.for_print(table), folder / f"{name}.md")
    print(tables.to_markdown(tables.for_print(table)))
    names = [test.name for test in sets]
    chart = figures.recall_bars(names, list(models), *tables.recall_arrays(results, list(models), names))
    (folder / f"{name}.png").write_bytes(figures.draw(chart))
    frozen = {r.dataset: r for r in results if r.model == FROZEN[-1]}
    places = {test.name: tables.query_places(test.queries) for test in sets}
    against = []
    for r in results:
        if r.model != FROZEN[-1]:
            difference = evaluate.compare(frozen[r.dataset], r, groups=places[r.dataset])
            against.append({"dataset": r.dataset, "method": r.model, **asdict(difference)})
    tables.write_table(pandas.DataFrame(against), folder / f"{name}-against-frozen.csv")
    for row in against:
        print("{dataset}: {method} {points:+.1f} points at R@1 [{low:+.1f}, {high:+.1f}]".format(**row))


def ship_town() -> None:
    town = ensure_town(DATA, "town", progress=True)
    values = yaml.safe_load((HERE / "params" / "town.yaml").read_text())
    models = evaluate.open_models(FROZEN)
    methods = {name: {**values, **changes} for name, changes in METHODS.items()}
    models |= train_and_keep(methods, RESULTS, town)
    measure_and_keep(models, [open_set(DATA, "town")], values, RESULTS, "town")


def ship_streets(data: Path, peers: list[str]) -> None:
    """Train on the street photographs and measure on every set of the folder; the others were never seen.

    `peers` are measured beside, by any name that `sagelib.evaluate.open_model` takes.
    """
    if not (data / "sf-streets").is_dir():
        raise SystemExit(f"{data} holds no sf-streets: name the folder of the photographs")
    values = yaml.safe_load((HERE / "params" / "sf-streets.yaml").read_text())
    others = sorted({path.parts[-3] for path in data.glob("*/images/test")} - {"sf-streets"})
    models = evaluate.open_models(("pixels", *FROZEN[-2:], *peers, "sage"), [RESULTS])
    folder = RESULTS / "photographs"
    models |= train_and_keep({"sf-streets": values}, folder, data / "sf-streets")
    sets = [open_set(data, name) for name in ("sf-streets", *others)]
    measure_and_keep(models, sets, values, folder, "photographs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = "of sf-streets and sets beside it: train and measure on these instead of the town"
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help=words)
    words = "a further model for the photographs, such as module:function of your own; may be repeated"
    parser.add_argument("--peer", action="append", default=[], metavar="MODEL", help=words)
    options = parser.parse_args()
    ship_streets(options.photographs, options.peer) if options.photographs else ship_town()
    return 0


if __name__ == "__main__":
    sys.exit(main())
