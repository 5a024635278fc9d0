"""Michel et al. 2019 on a small encoder: how many heads of a classifier can go?

    python scripts/fetch_models.py
    python scripts/prune_encoder.py --data FOLDER --out scripts/results

``FOLDER`` has ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of texts with a label 0
or 1 (sentences of film reviews: Pang and Lee 2005). For every seed MiniLM is fine-tuned on the
training texts, its heads are ranked by the gradient on others of them, rescored at each step,
and taken out beside random orders; the test texts judge. Then half of the heads are cut out and
the throughput measured beside the whole model, in turns.
"""

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import mechinterp as mi
from mechinterp import stats
from mechinterp._cache import fetched
from mechinterp.models import forward
from mechinterp.results import versions

CLASSES = ("negative", "positive")


def main() -> None:
    """Fine-tune, rank, judge, cut, measure; print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--rank", type=int, default=200)
    parser.add_argument("--judge", type=int, default=400)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--longest", type=int, default=40, help="tokens; longer texts are out")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    start = time.perf_counter()
    curves, model = [], None
    for seed in range(asked.seeds):
        model, curve = one_seed(asked, seed)
        curves.append(curve)
        value = curve.data["value"].sel(metric="accuracy").mean("prompt")[0]
        print(f"seed {seed}: accuracy by heads removed", np.round(value.values, 3).tolist())
        print(curve.against_random(metric="accuracy").to_string(), flush=True)
    assert model is not None
    found = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "asked": {k: v for k, v in vars(asked).items() if k not in ("data", "out")},
        **together(curves),
        "throughput": throughput(model, curves[-1]),
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print(json.dumps(found, indent=1))
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "prune_encoder.json").write_text(json.dumps(found, indent=1) + "\n")
        curves[0].save(asked.out / "prune_encoder.nc")
        figure = curves[0].plot(metric="accuracy").get_figure(root=True)
        assert figure is not None
        figure.savefig(asked.out / "prune_encoder.png", dpi=150, bbox_inches="tight")


def one_seed(asked: argparse.Namespace, seed: int) -> tuple[TransformerBridge, mi.PruningCurve]:
    """Return a fine-tuned classifier and its pruning curve on the test texts."""
    folder = fetched("minilm")
    assert folder is not None, "run scripts/fetch_models.py first"
    torch.manual_seed(seed)
    module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = mi.load_model(module, tokenizer=tokenizer)
    train = texts(asked, model, "train", asked.train + asked.rank, seed)
    tuned = mi.heal(
        model,
        train[: asked.train],
        evaluate_on=texts(asked, model, "validation", 200, seed),
        steps=asked.train // 16,
        batch_size=16,
        metric="accuracy",
        evaluations=2,
        seed=seed,
    )
    print(
        f"seed {seed}: fine-tuned, accuracy {tuned.curve.data['value'].mean('prompt').values}"
    )
    curve = mi.pruning_curve(
        tuned.model,
        train[asked.train :],
        method="gradient",
        options={"normalize_layers": True},
        steps=asked.points,
        evaluate_on=texts(asked, model, "test", asked.judge, 0),
        metric={"loss": "loss", "accuracy": "accuracy"},
        draws=asked.draws,
        seed=seed,
    )
    return tuned.model, curve


def texts(
    asked: argparse.Namespace, model: TransformerBridge, name: str, n: int, seed: int
) -> mi.Labelled:
    """Return ``n`` labelled texts of a file, drawn under a seed, none of them long."""
    rows = [json.loads(line) for line in (asked.data / f"{name}.jsonl").open(encoding="utf-8")]
    order = np.random.default_rng(seed).permutation(len(rows))
    kept = [rows[i] for i in order if len(rows[i]["text"].split()) <= 0.75 * asked.longest][:n]
    return mi.Labelled.from_strings(
        model,
        [row["text"] for row in kept],
        [row["label"] for row in kept],
        classes=CLASSES,
        name=f"film reviews, {name}",
    )


def together(curves: list[mi.PruningCurve]) -> dict:
    """Return what all seeds say, paired over prompts: the mean over seeds of each prompt."""
    value = np.stack([c.data["value"].sel(metric="accuracy").values[0] for c in curves])
    random = np.stack([c.data["random"].sel(metric="accuracy").values for c in curves])
    removed = curves[0].data["removed"].values
    gain = (value - random.mean(1)).mean(0)  # removed prompt
    area = np.trapezoid(gain, removed, axis=0) / removed[-1]
    low, high = stats.bootstrap_interval(area[None])
    steps = gain[1:-1]
    below = (stats.max_t(steps) < 0.05) & (steps.mean(1) < 0)
    lost = (value[:, :1] - value).mean(0)
    _, bound = stats.bootstrap_interval(lost[1:], 0.90)
    fine = np.logical_and.accumulate([True, *(bound < 0.02)])
    by_seed = np.trapezoid(value - random.mean(1), removed, axis=1) / removed[-1]
    return {
        "removed": removed.tolist(),
        "accuracy": value.mean((0, 2)).tolist(),
        "accuracy_random": random.mean((0, 1, 3)).tolist(),
        "area_above_random": float(area.mean()),
        "interval": [float(low[0]), float(high[0])],
        "p_over_prompts": float(stats.sign_flip_test(area[None])[0]),
        "area_by_seed": by_seed.mean(1).tolist(),
        "p_by_seed": stats.sign_flip_test(by_seed).tolist(),
        "steps_significantly_below_random": int(below.sum()),
        "heads_that_can_go_at_2_points": int(removed[fine][-1]),
        "of": int(removed[-1]),
    }


def throughput(model: TransformerBridge, curve: mi.PruningCurve, batch: int = 16) -> dict:
    """Return texts per second with all heads and with half of them, measured in turns."""
    half = curve.removed("gradient", int(curve.data["removed"].values[-1]) // 2)
    both = {"whole": model, "half the heads": mi.prune_heads(model, half)}
    tokens = torch.randint(
        1000, 20000, (batch, 128), generator=torch.Generator().manual_seed(0)
    )
    seconds: dict[str, list[float]] = {name: [] for name in both}
    with torch.no_grad():
        for turn in range(8):
            for name, one in both.items():
                start = time.perf_counter()
                forward(one, tokens)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    rates = {name: batch / statistics.median(each) for name, each in seconds.items()}
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "texts_per_second": rates,
        "ratio": statistics.median(ratios),
        "batch": batch,
        "tokens": 128,
    }


if __name__ == "__main__":
    main()
