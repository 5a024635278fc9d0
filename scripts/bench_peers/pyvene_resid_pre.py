"""Patch the residual stream, layer by position, with pyvene: one intervention per cell.

    python scripts/bench_peers/pyvene_resid_pre.py FOLDER QUESTION.json

Run by ``scripts/bench_patching.py`` in an environment that has pyvene; needs nothing of
mechinterp. FOLDER holds a Llama-like model; QUESTION has ``clean`` and ``corrupted`` (token
ids), ``answer``, ``distractor`` (ids) and ``layers``. Each call runs the source as well, as in
pyvene's own tutorials. Prints seconds and the logit difference of each cell as JSON.
"""

import argparse
import contextlib
import json
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

with contextlib.redirect_stdout(sys.stderr):
    import pyvene as pv

THREADS = 2


def sweep(model: torch.nn.Module, question: dict) -> list:
    """Return the logit difference of every cell, layer by position, patched into corrupted."""
    base = {"input_ids": torch.tensor([question["corrupted"]])}
    source = {"input_ids": torch.tensor([question["clean"]])}
    answer, distractor = question["answer"], question["distractor"]
    found = []
    for layer in question["layers"]:
        place = {"layer": layer, "component": "block_input"}
        patched = pv.IntervenableModel(
            {**place, "intervention_type": pv.VanillaIntervention}, model=model
        )
        row = []
        for position in range(len(question["corrupted"])):
            _, out = patched(base, [source], {"sources->base": position})
            logits = out.logits[0, -1]
            row.append(float(logits[answer] - logits[distractor]))
        found.append(row)
    return found


def main() -> None:
    """Time the sweep, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("question", type=Path)
    arguments = parser.parse_args()
    question = json.loads(arguments.question.read_text(encoding="utf-8"))
    torch.set_num_threads(THREADS)
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
        sweep(model.eval(), question | {"layers": question["layers"][:1]})  # warm-up
        start = time.perf_counter()
        values = sweep(model, question)
        seconds = time.perf_counter() - start
    names = ("pyvene", "torch", "transformers")
    versions = {name: metadata.version(name) for name in names}
    print(json.dumps({"seconds": seconds, "values": values, "versions": versions}))


if __name__ == "__main__":
    main()
