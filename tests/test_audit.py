"""The audit of contexts: the leak where there is one and only there, agreement with evaluation, the
command."""

import pandas as pd
import pytest
from test_evaluate import PLACES, Noisy, write_two_sets

from sagelib import runs
from sagelib.describe import baseline_pixels
from sagelib.evaluate import evaluate
from sagelib.places import open_set
from workbench import audit as command
from workbench.audit import audit_contexts, load_audit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_two_sets(tmp_path_factory.mktemp("data"))


def test_the_audit_shows_the_ordering_leak_where_there_is_one_and_only_there(data, tmp_path):
    model = Noisy()
    contexts = ("none", "solo", "sorted-2", "shuffled-2", "sorted-8", "shuffled-8")
    options = dict(contexts=contexts, shuffles=3, progress=False)
    aligned = audit_contexts(model, open_set(data, "aligned"), tmp_path, **options)
    assert model.embedded == 2 * PLACES, "one embedding serves all contexts"
    assert aligned.table["context"].tolist() == [
        *("none", "solo", "sorted-2", *["shuffled-2"] * 3, "sorted-8", *["shuffled-8"] * 3)
    ]
    leak = aligned.leak().set_index("n")
    assert leak.loc[8, "points"] > 35 and leak.loc[8, "low"] > 25  # by a wide margin
    assert leak.loc[2, "low"] > 10

    unaligned = audit_contexts(model, open_set(data, "unaligned"), tmp_path, **options)
    assert abs(unaligned.leak().set_index("n").loc[8, "points"]) < 12
    # Contexts without a batch know nothing of the order: the two sets hold the same pictures.
    for context in ("none", "solo"):
        rows = [a.table[a.table["context"] == context].iloc[0] for a in (aligned, unaligned)]
        assert rows[0]["hits@1"] == rows[1]["hits@1"]

    summary = aligned.summary().set_index("context")
    assert summary.loc["shuffled-8", "shuffles"] == 3
    assert summary.loc["shuffled-8", "spread_low"] <= summary.loc["shuffled-8", "R@1"]
    assert summary.loc["none", "spread_low"] == summary.loc["none", "spread_high"]

    again = audit_contexts(model, open_set(data, "aligned"), tmp_path, **options)
    pd.testing.assert_frame_equal(again.table, load_audit(aligned.path).table)
    assert model.embedded == 4 * PLACES


def test_the_audit_agrees_with_evaluation(data, tmp_path):
    model, test_set = Noisy(), open_set(data, "aligned")
    audit = audit_contexts(
        model, test_set, tmp_path, contexts=("sorted-4", "shuffled-4"), shuffles=2, seed=3, progress=False
    )
    results = [evaluate(model, test_set, tmp_path, context="sorted-4", progress=False)]
    results += [
        evaluate(model, test_set, tmp_path, context="shuffled-4", seed=s, progress=False) for s in (3, 4)
    ]
    assert audit.table["hits@1"].tolist() == [r.hits[1] for r in results]


def test_the_audit_refuses(data, tmp_path):
    test_set = open_set(data, "aligned")
    with pytest.raises(ValueError, match="shuffles must be"):
        audit_contexts(Noisy(), test_set, tmp_path, shuffles=0)
    with pytest.raises(ValueError, match="contexts must be different"):
        audit_contexts(Noisy(), test_set, tmp_path, contexts=("solo", "solo"))
    with pytest.raises(ValueError, match="no InteractHead"):
        audit_contexts(baseline_pixels, test_set, tmp_path, contexts=("none", "solo"), progress=False)


def test_the_command_audits_runs_and_heads_of_random_weights(data, tmp_path, capsys):
    """A head of random weights on a frozen backbone; every context and shuffle; a second call finds it."""
    name = "random-head:gem2x2:tf_efficientnet_lite2:random"
    arguments = ["--models", f"random={name}", "--sets", str(data / "aligned"), "--runs", str(tmp_path)]
    arguments += ["--shuffles", "2", "--size", "32", "--device", "cpu", "--export", str(tmp_path / "small")]
    assert command.main(arguments) == 0
    assert "random on aligned" in capsys.readouterr().out
    kept = load_audit(runs.find_runs(tmp_path / "small", "audit")[0].dir)
    sizes = [f"{kind}-{n}" for n in (2, 4, 8, 16, 32) for kind in ("sorted", "shuffled")]
    assert kept.summary()["context"].tolist() == ["none", "solo", *sizes]
    assert (kept.table["kind"] == "shuffled").sum() == 2 * 5 and kept.leak()["n"].tolist() == [
        2,
        4,
        8,
        16,
        32,
    ]
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "audit").rglob("audit.csv")}
    assert command.main(arguments) == 0
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "audit").rglob("audit.csv")}
    for name, sentence in (
        ("gem:tf_efficientnet_lite2:random", "no InteractHead to be audited"),
        ("random-head:pixels", "can be given no head"),
        ("nobody", "there is no model 'nobody'"),
    ):
        assert command.main(["--models", name, "--sets", str(data / "aligned"), "--runs", str(tmp_path)]) == 1
        assert sentence in capsys.readouterr().err
