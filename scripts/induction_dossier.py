"""The induction heads of SmolLM2-135M: the dossier, recorded.

    python scripts/fetch_models.py && python scripts/induction_dossier.py

Scores of all heads, K-composition, path patching into the candidates' keys, and the knock-out
of the candidates against 1,000 different random sets of heads of the same layers. Prints the
account and writes ``induction_dossier.json`` and ``induction_dossier.png`` into
``scripts/results/``, or into another folder (``--out``).
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import mechinterp as mi
from mechinterp.results import versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=25, help="of the random tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    model = mi.load_model(asked.model)
    dossier = mi.induction_dossier(
        model,
        n=asked.draws,
        n_sets=asked.sets,
        n_prompts=asked.prompts,
        length=asked.length,
    )
    print(dossier)
    lost = dossier.knock_out
    random = lost.data["random"].values
    half = dossier.loss.sizes["position"] // 2
    found = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": asked.model,
        "draws": asked.draws,
        "prompts": asked.prompts,
        "length": asked.length,
        "loss_first_copy": float(dossier.loss[:, 1:half].mean()),
        "loss_second_copy": float(dossier.loss[:, half + 1 :].mean()),
        "criterion": f"{dossier.settings['least']} above untrained heads, p < 0.05 (Holm)",
        "matching_heads": [f"{a}.{b}" for a, b in dossier.matching],
        "chosen": dossier.settings["chosen"],
        "candidates": [told(row) for row in dossier.to_frame().to_dict("records")],
        "knock_out": {
            "rise": float(lost.data["together"].mean()),
            "random_sets": len(random),
            "possible_sets": lost.convention.settings["sets_possible"],
            "random_mean": float(random.mean()),
            "random_largest": float(random.max()),
            "p": lost.p,
            "smallest_p": lost.smallest_p,
        },
        "versions": versions(),
    }
    text = json.dumps(found, indent=1, default=float) + "\n"
    (asked.out / "induction_dossier.json").write_text(text, encoding="utf-8")
    figure = dossier.figure()
    figure.savefig(asked.out / "induction_dossier.png", dpi=120, bbox_inches="tight")


def told(row: dict) -> dict:
    """Return a row as JSON has it: what is not there is null, and no p-value is 0."""
    found = {name: None if value != value else value for name, value in row.items()}
    p = found["p_adjusted"]
    return found | {"p_adjusted": "<0.001" if p is not None and p < 0.001 else p}


if __name__ == "__main__":
    main()
