"""Draw how SmolLM2-135M moves the subject's name to the end of an IOI prompt.

    python scripts/fetch_models.py && python scripts/plot_ioi.py

Patches the clean residual stream into the corrupted run by role and layer, and writes
``scripts/results/ioi_resid_pre.png`` and the result beside it.
"""

import argparse
from pathlib import Path

import mechinterp as mi

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Patch, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=32, help="prompts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = mi.load_model("smollm2-135m")
    task = mi.load_task("ioi", model, arguments.n)
    result = mi.activation_patching(
        model, task, "resid_pre", positions=["io", "first_subject", "subject", "end"]
    )
    arguments.out.mkdir(exist_ok=True)
    result.save(arguments.out / "ioi_resid_pre.nc")
    figure = result.plot().get_figure(root=True)
    assert figure is not None
    figure.savefig(arguments.out / "ioi_resid_pre.png", dpi=150)
    print("mean clean logit difference", float(result.data["clean"].mean()))
    print(result.top(8))


if __name__ == "__main__":
    main()
