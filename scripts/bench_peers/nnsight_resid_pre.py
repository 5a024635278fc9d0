"""Patch the residual stream, layer by position, with nnsight: one trace per cell.

    python scripts/bench_peers/nnsight_resid_pre.py FOLDER QUESTION.json

Run by ``scripts/bench_patching.py`` in an environment that has nnsight; needs nothing of
mechinterp. FOLDER holds a Llama-like model; QUESTION has ``clean`` and ``corrupted`` (token
ids), ``answer``, ``distractor`` (ids) and ``layers``. Prints seconds and the logit difference
of each cell as JSON.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import torch
from nnsight import TransformersModel

THREADS = 2


def sweep(model: TransformersModel, question: dict, clean: dict[int, torch.Tensor]) -> list:
    """Return the logit difference of every cell, layer by position, patched into corrupted."""
    corrupted = torch.tensor([question["corrupted"]])
    answer, distractor = question["answer"], question["distractor"]
    found = []
    for layer in question["layers"]:
        row = []
        for position in range(corrupted.shape[1]):
            with model.trace(corrupted):
                model.model.layers[layer].input[:, position] = clean[layer][:, position]
                logits = model.lm_head.output[0, -1].save()
            row.append(float(logits[answer] - logits[distractor]))
        found.append(row)
    return found


def main() -> None:
    """Store the clean run, time the sweep, print JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("question", type=Path)
    arguments = parser.parse_args()
    question = json.loads(arguments.question.read_text(encoding="utf-8"))
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        model = TransformersModel(
            arguments.folder, task="text-generation", dtype=torch.float32, dispatch=True
        )
        clean = {}
        for layer in question["layers"]:
            with model.trace(torch.tensor([question["clean"]])):
                value = model.model.layers[layer].input.save()
            clean[layer] = value
        sweep(model, question | {"layers": question["layers"][:1]}, clean)  # warm-up
        start = time.perf_counter()
        values = sweep(model, question, clean)
        seconds = time.perf_counter() - start
    names = ("nnsight", "torch", "transformers")
    versions = {name: metadata.version(name) for name in names}
    print(json.dumps({"seconds": seconds, "values": values, "versions": versions}))


if __name__ == "__main__":
    main()
