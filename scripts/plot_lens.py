"""Draw where SmolLM2-135M decides on a capital, and what a tuned lens gains.

    python scripts/fetch_models.py && python scripts/plot_lens.py

Reads the residual stream out at every layer on the capitals that the model knows, attributes
their logit differences to components, fits a tuned lens to the embedded model and evaluates it
on another book. Writes ``lens.json`` and ``lens_*.png`` into ``scripts/results/``.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import mechinterp as mi
from mechinterp.results import Result, versions

HERE = Path(__file__).parent
RESULTS, BOOKS = HERE / "results", HERE.parent / "tests" / "data"


def saved(result: Result, path: Path, **how: object) -> None:
    """Draw a result into a file."""
    figure = result.plot(**how).get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=130)


def capitals(n: int | None, out: Path) -> dict[str, object]:
    """Return where capitals appear in SmolLM2-135M: ranks and shares by layer."""
    model = mi.load_model("smollm2-135m")
    task = mi.load_task("country_capital", model, n).filter(model)
    lens = mi.logit_lens(model, task)
    saved(lens, out / "lens_capitals.png")
    text = "The capital of France is the city of Paris and that of Japan is"
    saved(mi.logit_lens(model, mi.Text.from_strings(model, text)), out / "lens_tokens.png")
    rank = lens.data["rank"].isel(position=0).sel(target="answer").median("prompt")
    shares = mi.direct_logit_attribution(model, task)
    saved(shares, out / "lens_attribution.png")
    top = shares.top(10)
    gap = abs(shares.data["total"] - shares.data["logit_diff"]).max()
    return {
        "prompts": len(task),
        "median_rank_by_layer": rank.values.tolist(),
        "mean_kl_by_layer": lens.data["kl"].mean(["prompt", "position"]).values.tolist(),
        "first_layer_with_median_rank_below": {
            most: int(lens.data["layer"].values[(rank.values < most).argmax()])
            for most in (10_000, 1_000, 100, 10)
        },
        "mean_logit_diff": float(shares.data["logit_diff"].mean()),
        "largest_gap_of_shares_to_logit_diff": float(gap),
        "top_components": dict(
            zip(top["component"], top["effect"].astype(float).round(4), strict=True)
        ),
    }


def tuned(steps: int, out: Path) -> dict[str, object]:
    """Return what a tuned lens of the embedded model gains on a book it has not seen."""
    model = mi.load_model("embedded")
    book, other = (
        mi.Text.from_strings(model, (BOOKS / f"{name}.txt").read_text(), context=128, name=name)
        for name in ("goblin", "five_children")
    )
    began = time.perf_counter()
    lens = mi.TunedLens.fit(model, book, steps=steps)
    seconds = time.perf_counter() - began
    found = lens.evaluate(model, other)
    saved(found, out / "lens_tuned.png")
    print(found.table().to_string())
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "table": found.table().round(4).to_dict("list"),
    }


def main() -> None:
    """Read, attribute, fit, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, help="prompts; all by default")
    parser.add_argument("--steps", type=int, default=250, help="of the tuned lens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=["capitals", "tuned"])
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / "lens.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    if arguments.only != "tuned":
        found["capitals"] = capitals(arguments.n, arguments.out)
    if arguments.only != "capitals":
        found["tuned"] = tuned(arguments.steps, arguments.out)
    found["versions"] = versions()
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
