"""Make the small set of finished runs that comes with the workbench, in ``data/results``: ``make results``.

Trainings on the town with one file of parameters, SAGE and two comparators, and their evaluations on its test part; SAGE once more with the
graph made once, for what that costs. Only small files are kept: manifests, logs, the best weights of the trained parts, results and tables.
"""

import shutil
import sys
from pathlib import Path

import yaml

from sagelib import evaluate, runs
from sagelib.images import Preprocess
from sagelib.places import open_set
from sagelib.town import ensure_town
from sagelib.train import TrainConfig, open_run, train, training_places

HERE = Path(__file__).resolve().parent
DATA, RUNS, RESULTS = HERE.parent / "data", runs.runs_root(), HERE.parent / "data" / "results"

PROBES = {"channels": 64, "probes": 32, "token_dim": 256}
METHODS = {
    "sage": {},
    "cfp": {"aggregator_options": {**PROBES, "alpha": None}},
    "salad": {
        "aggregator": "salad",
        "aggregator_options": {"clusters": 32, "channels": 64, "token_dim": 256},
        "data_init": None,
    },
    "sage-static": {"schedule": "static"},
}
TIMED_ONLY = ("sage-static",)  # kept for its log
FROZEN = ("pixels", "gem2x2:sage_vit_tiny:random", "gem2x2:sage_vit_tiny")


def keep(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the small files of a run; the folder appears whole."""
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    for pattern in patterns:
        for path in source.glob(pattern):
            (aside / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, aside / path.relative_to(source))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def main() -> int:
    town = ensure_town(DATA, "town", progress=True)
    values = yaml.safe_load((HERE / "params" / "town.yaml").read_text())
    base = {key: value for key, value in values.items() if key in TrainConfig.field_names()}
    mined, validation, test = (
        training_places(town),
        open_set(DATA, "town", split="val"),
        open_set(DATA, "town"),
    )
    models = {name: evaluate.open_model(name) for name in FROZEN}
    for name, changes in METHODS.items():
        config = TrainConfig.from_mapping({**base, **changes})
        run = open_run(RUNS, name, config, mined=mined, validation=validation)
        trained = train(config, run, mined=mined, validation=validation).model
        weights = () if name in TIMED_ONLY else ("best/*",)
        keep(run.dir, RESULTS / "train" / name, ("manifest.json", "log.jsonl", *weights))
        if name not in TIMED_ONLY:
            models[name] = trained
    look = Preprocess(base["validation_size"], mode=base["preprocess"])
    shutil.rmtree(RESULTS / "evaluate", ignore_errors=True)
    results = [
        evaluate.evaluate(m, test, RUNS, model_name=name, preprocess=look) for name, m in models.items()
    ]
    for result in results:
        keep(
            result.path,
            RESULTS / "evaluate" / result.path.name,
            ("manifest.json", "result.json", "ranks.npy"),
        )
    table = evaluate.results_table(results, published=False)
    for ending in ("md", "csv"):
        evaluate.write_table(table, RESULTS / f"town.{ending}")
    print(evaluate.to_markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
