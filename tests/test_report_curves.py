"""Curves in a report: every line is the mean that the result itself gives, in its band."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import zoo
from test_few_shot import CAPITALS
from test_report import numbers, of_kind

import mechinterp as mi

UNITS = {"logit_diff": "nats of log-odds", "accuracy": "share right"}
STORED = Path(__file__).parents[1] / "scripts" / "results"


@cache
def result(kind: str) -> mi.Result:
    if kind == "pruning":
        return mi.load_result(STORED / "prune_smollm2_ioi.nc")
    if kind == "training":
        return mi.load_result(STORED / "train_checkpoints.nc")
    model = mi.load_model(zoo.zoo("gpt2"), tokenizer=zoo.tokenizer())
    if kind == "few-shot":
        return mi.few_shot(model, CAPITALS, shots=(0, 2), n=4)
    text = mi.Text.from_tokens(model, zoo.tokens(4, 12))
    if kind == "in context":
        return mi.icl_score(model, text, early=2, late=9)
    return mi.heal(model, text, steps=2, batch_size=2, evaluations=2).curve


def expected(kind: str, found: mi.Result) -> dict[tuple[str, str], np.ndarray]:
    """Means by chart and line, from the result's own numbers."""
    data = found.data
    if kind == "pruning":
        value = data["value"].mean("prompt")
        methods = data["ranked_by"].values.tolist()
        charts = {
            "logit_diff": "logit_diff (nats of log-odds)",
            "accuracy": "accuracy (share right)",
        }
        return {
            (said, method.replace("_", " ")): value.sel(metric=metric, ranked_by=method).values
            for metric, said in charts.items()
            for method in methods
        } | {
            (said, "random orders"): data["random"]
            .sel(metric=metric)
            .mean(("prompt", "draw"))
            .values
            for metric, said in charts.items()
        }
    if kind == "training":
        assert isinstance(found, mi.TrainingCurve)
        means = found.means()
        return {("loss (nats)", "loss"): means["loss"].values}
    if kind == "few-shot":
        value = data["value"].mean("prompt").sel(metric="log_prob")
        return {("log_prob (nats)", "true"): value.sel(condition="true").values}
    if kind == "in context":
        return {("loss (nats)", "loss"): data["loss"].mean("prompt").values}
    return {("loss (nats)", "loss"): data["value"].mean("prompt").values}


@pytest.mark.parametrize("kind", ["pruning", "training", "few-shot", "in context", "healing"])
def test_every_line_is_a_mean_inside_its_band(kind, tmp_path):
    found = result(kind)
    path = mi.report(found, tmp_path / "curve.html")
    panel = of_kind(path.read_text(encoding="utf-8"), "lines")
    lines = {(c["name"], line["name"]): line for c in panel["charts"] for line in c["lines"]}
    for key, mean in expected(kind, found).items():
        np.testing.assert_allclose(numbers(lines[key]["y"]), mean, rtol=1e-5, atol=1e-6)
        assert len(panel["x"]["labels"]) == len(mean)
    for line in lines.values():
        if line["low"] is None:
            continue
        y, low, high = (numbers(line[name]) for name in ("y", "low", "high"))
        seen = np.isfinite(low)
        assert (low[seen] <= y[seen] + 1e-5).all() and (y[seen] <= high[seen] + 1e-5).all()
