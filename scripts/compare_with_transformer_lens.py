"""Compare every cell of a patching sweep with ``transformer_lens.patching`` on SmolLM2-135M.

    python scripts/fetch_models.py && python scripts/compare_with_transformer_lens.py

Runs both on one pair of IOI prompts, all layers, heads and positions, and stores the largest
differences in ``scripts/results/compare_with_transformer_lens.json``, site by site.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformer_lens import patching as oracle

import mechinterp as mi
from mechinterp.metrics import logit_diff
from mechinterp.results import versions

SWEEPS = {
    "resid_pre": (oracle.get_act_patch_resid_pre, "each"),
    "attn_out": (oracle.get_act_patch_attn_out, "each"),
    "mlp_out": (oracle.get_act_patch_mlp_out, "each"),
    "z": (oracle.get_act_patch_attn_head_out_all_pos, "all"),
    "pattern": (oracle.get_act_patch_attn_head_pattern_all_pos, "all"),
}
RESULTS = Path(__file__).parent / "results"


def compare(model, task: mi.Task, site: str) -> dict[str, float | int]:
    """Run one sweep both ways and return how far apart they are."""
    assert task.corrupted is not None
    sweep, positions = SWEEPS[site]
    with torch.no_grad():
        _, clean = model.run_with_cache(task.clean.tokens)
        start = time.perf_counter()
        theirs = sweep(
            model,
            task.corrupted.tokens,
            clean,
            lambda logits: logit_diff(logits[:, -1], task.targets()).mean(),
        ).numpy()
        between = time.perf_counter()
    ours = mi.activation_patching(model, task, site, positions=positions)
    end = time.perf_counter()
    patched = ours.data["patched"].mean("prompt").values
    gap = np.abs(patched - theirs)
    largest_logit = float(task.logits(model).abs().max())
    return {
        "cells": int(theirs.size),
        "largest_difference": float(gap.max()),
        "mean_difference": float(gap.mean()),
        "largest_effect": float(np.abs(ours.effect.values).max()),
        "tolerance": 1e-5 * largest_logit,
        "cells_beyond_tolerance": int((gap > 1e-5 * largest_logit).sum()),
        "seconds_transformer_lens": between - start,
        "seconds_mechinterp": end - between,
    }


def main() -> None:
    """Compare all sites, print a table, store the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sites", nargs="*", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--out", type=Path, default=RESULTS / f"{Path(__file__).stem}.json")
    arguments = parser.parse_args()
    model = mi.load_model("smollm2-135m")
    task = mi.load_task("ioi", model, 1)
    record = {
        "model": "SmolLM2-135M-Instruct",
        "fingerprint": mi.fingerprint(model),
        "task": "ioi, 1 prompt",
        "metric": "logit_diff, denoising",
        "versions": versions(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "sites": {},
    }
    found = record["sites"]
    arguments.out.parent.mkdir(exist_ok=True)
    for site in arguments.sites:
        found[site] = compare(model, task, site)
        print(site, found[site], flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = Table("site", "cells", "largest difference", "largest effect", "tolerance")
    for site, row in found.items():
        cells = [
            f"{row[key]:.2g}" for key in ("largest_difference", "largest_effect", "tolerance")
        ]
        table.add_row(site, str(row["cells"]), *cells)
    Console().print(table)
    if any(row["cells_beyond_tolerance"] for row in found.values()):
        sys.exit("some cells differ by more than the tolerance")


if __name__ == "__main__":
    main()
