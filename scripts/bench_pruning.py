"""What pruning gains: a model and a pruned copy of it, side by side in one run.

    python scripts/bench_pruning.py --model smollm2-135m --heads 0.5

Latency of prefill and of decoding with the cache, taken in turns so that both models see the
same machine; peak memory of a process of its own that loads the model and generates; and the
cost by formula. Which heads go is drawn at random: the gain does not depend on it, the quality
does, and is not measured here. Prints a table, and writes JSON with ``--out``.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import mechinterp as mi
from mechinterp.sites import n_heads


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--heads", type=float, default=0.5, help="share of heads to remove")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak_of is not None:
        print(peak_memory(asked))
        return
    whole, pruned = both(asked)
    models: dict[str, Any] = {"whole": whole, "pruned": pruned}
    found = {
        "machine": {"processor": platform.processor(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "mechinterp": mi.__version__},
        "asked": {name: value for name, value in vars(asked).items() if name != "out"},
        "formula": {
            name: asdict(mi.cost(model, context=asked.prompt)) for name, model in models.items()
        },
        "seconds": in_turns(models, asked),
        "peak_bytes": {name: peak_of(model, asked) for name, model in models.items()},
    }
    show(found)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=2, default=str) + "\n")


def both(asked: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and a copy without a random share of its heads."""
    model = mi.load_model(asked.model)
    heads = [
        (layer, head)
        for layer in range(len(model.blocks))
        for head in range(n_heads(model, "z", layer))
    ]
    generator = torch.Generator().manual_seed(asked.seed)
    order = torch.randperm(len(heads), generator=generator).tolist()
    gone = [heads[i] for i in order[: round(asked.heads * len(heads))]]
    return model, mi.prune_heads(model, gone)


def in_turns(models: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Return medians and all runs, in seconds, of prefill and of one decoded token."""
    plain = {name: mi.unwrap(model) for name, model in models.items()}
    tokens = prompt(models["whole"], asked)
    runs: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "per_token": []} for name in models
    }
    for repeat in range(asked.repeats + 1):
        for name, module in plain.items():
            prefill, decode = one_run(module, tokens, asked.new)
            if repeat:  # the first one warms up
                runs[name]["prefill"].append(prefill)
                runs[name]["per_token"].append(decode / asked.new)
    return {
        name: {
            kind: {"median": statistics.median(all_), "runs": all_}
            for kind, all_ in own.items()
        }
        for name, own in runs.items()
    }


@torch.no_grad()
def one_run(module: Any, tokens: torch.Tensor, new: int) -> tuple[float, float]:
    """Return the seconds of a prefill and of decoding ``new`` tokens greedily after it."""
    done = clock(tokens.device)
    start = done()
    output = module(tokens, use_cache=True)
    middle = done()
    for _ in range(new):
        following = output.logits[:, -1:].argmax(-1)
        output = module(following, past_key_values=output.past_key_values, use_cache=True)
    return middle - start, done() - middle


def clock(device: torch.device) -> Callable[[], float]:
    """Return a clock that waits for the device."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def prompt(model: Any, asked: argparse.Namespace) -> torch.Tensor:
    """Return random tokens where the model wants them."""
    generator = torch.Generator().manual_seed(asked.seed)
    shape = (asked.batch, min(asked.prompt, model.cfg.n_ctx - asked.new))
    tokens = torch.randint(model.cfg.d_vocab, shape, generator=generator)
    return tokens.to(next(model.original_model.parameters()).device)


def peak_of(model: Any, asked: argparse.Namespace) -> int:
    """Return the peak memory of a process that loads a model and generates."""
    with tempfile.TemporaryDirectory() as folder:
        saved = mi.save_model(model, Path(folder) / "model")
        given = [
            f"--{name}={getattr(asked, name)}" for name in ("batch", "prompt", "new", "seed")
        ]
        command = [sys.executable, __file__, "--peak-of", str(saved), *given]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1])


def peak_memory(asked: argparse.Namespace) -> int:
    """Load the model, run it once, and return the most memory it took beside the libraries."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (Linux)
    model = mi.load_model(asked.peak_of)
    tokens = prompt(model, asked)
    one_run(mi.unwrap(model), tokens, asked.new)
    if tokens.is_cuda:
        return int(torch.cuda.max_memory_allocated())
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return the memory that this process has (``VmRSS``) or had at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def show(found: dict[str, Any]) -> None:
    """Print the two models side by side."""
    rows = [
        (name, [found["formula"][model][name] for model in ("whole", "pruned")])
        for name in (
            "parameters",
            "attention_parameters",
            "flops_per_token",
            "cache_bytes_per_token",
        )
    ]
    for kind in ("prefill", "per_token"):
        medians = [1e3 * found["seconds"][m][kind]["median"] for m in ("whole", "pruned")]
        rows.append((f"{kind}, ms", medians))
    rows.append(("peak_bytes", [found["peak_bytes"][m] for m in ("whole", "pruned")]))
    print(f"{'':24}{'whole':>16}{'pruned':>16}{'whole/pruned':>14}")
    for name, (whole, pruned) in rows:
        digits = 0 if isinstance(whole, int) else 2
        ratio = whole / pruned if pruned else float("nan")
        print(f"{name:24}{whole:>16,.{digits}f}{pruned:>16,.{digits}f}{ratio:>14.2f}")


if __name__ == "__main__":
    main()
