"""Train the embedded model: a small GPT-2 that has learned induction.

One idea: most of a batch is at first random tokens that repeat, the rest is prose. The repeats
can only be predicted by copying from context, which is what an induction head does; the prose
makes it a language model. Once induction is there the share of repeats falls, and what is left
of the budget goes to the prose.

Run it again with the same ``--out`` and it resumes from its last checkpoint. The released model
comes from three training runs and an export (its schedule was changed under way)::

    T="--text train.txt --validation validation.txt --out embedded-run --threads 1"
    python scripts/train_embedded.py $T --steps 1500 --until 775
    python scripts/train_embedded.py $T --steps 2300 --until 1300
    python scripts/train_embedded.py $T --steps 2000
    python scripts/train_embedded.py $T --export mechinterp/data/embedded --test test.txt

The text: 23 public-domain children's books (21 to train on, one each for validation and test),
one paragraph a line, books separated by ``<|endofbook|>``, from
mlschmitt/classic-books-markdown at commit 9448827 with the markdown marks removed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

BOS = "<|endoftext|>"
BOOK = "<|endofbook|>"
VOCABULARY = 3072
SEED = 0
WINDOWS = ((64, 0.2), (128, 0.5), (256, 0.8), (512, 1.0))  # tokens, until this share of steps


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``VOCABULARY`` tokens learned on ``text``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.replace(BOOK, "").splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=512
    )


def build_model() -> GPT2LMHeadModel:
    """Return the untrained model: GPT-2, 4 layers, 8 heads, width 256, context 512."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=256,
        n_layer=4,
        n_head=8,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    # Learned positions start as sinusoids: attending to the token before is then a rotation
    # away, and the previous-token heads that induction is built on form several times sooner.
    position = torch.arange(config.n_positions)[:, None]
    rate = torch.exp(-math.log(1000.0) * torch.arange(0, config.n_embd, 2) / config.n_embd)
    waves = torch.cat([(position * rate).sin(), (position * rate).cos()], dim=1)
    model.transformer.wpe.weight.data = 0.04 * waves
    return model


class Prose:
    """Token stream of a text, sampled in windows that start at a paragraph."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        paragraphs = [p + "\n" for p in text.replace(BOOK, "").split("\n") if p.strip()]
        encoded = tokenizer(paragraphs, add_special_tokens=False)["input_ids"]
        self.ids = np.concatenate([np.asarray(p, dtype=np.int64) for p in encoded])
        ends = np.cumsum([len(p) for p in encoded])
        self.starts = np.concatenate([[0], ends[:-1]])
        self.n_bytes = sum(len(p.encode()) for p in paragraphs)

    def batch(self, rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
        """Return ``rows`` windows of ``length`` tokens, each behind a start token."""
        possible = self.starts[self.starts < len(self.ids) - length]
        offsets = rng.choice(possible, rows)
        windows = np.stack([self.ids[o : o + length - 1] for o in offsets])
        return np.concatenate([np.zeros((rows, 1), dtype=np.int64), windows], axis=1)

    def all_windows(self, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the whole text as overlapping windows, and which tokens each one is to score.

        Windows start ``stride`` tokens apart, each behind a start token; a token is scored in
        the first window that reaches it. What lies beyond the end is -1.
        """
        body = length - 1
        starts = np.arange(0, max(1, len(self.ids) - body + stride), stride)
        padded = np.concatenate([self.ids, np.full(length, -1)])
        windows = np.stack([padded[start : start + body] for start in starts])
        scored = windows >= 0
        scored[1:, : body - stride] = False
        opening = np.zeros((len(windows), 1), dtype=np.int64)
        return np.concatenate([opening, windows], axis=1), scored


def repeats(rows: int, length: int, rng: np.random.Generator, skew: float = 1) -> np.ndarray:
    """Return rows of random tokens that repeat with a period drawn log-uniformly from 8 up.

    ``skew`` above 1 draws low ids more often (uniform to that power).
    """
    out = np.zeros((rows, length), dtype=np.int64)
    for row in out:
        period = int(np.exp(rng.uniform(np.log(8), np.log(length // 2))))
        segment = 1 + ((VOCABULARY - 1) * rng.random(period) ** skew).astype(np.int64)
        row[1:] = np.resize(segment, length - 1)
    return out


@torch.no_grad()
def copying_reach(model: GPT2LMHeadModel, n: int = 64) -> int:
    """Return the last position at which 64 random tokens are still copied (loss < 1 nat)."""
    segment = np.random.default_rng(12345).integers(1, VOCABULARY, (n, 64))
    ids = torch.from_numpy(np.concatenate([np.zeros((n, 1), np.int64), segment, segment], 1))
    logits = model(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)
    return int((loss < 1).nonzero().max()) + 1


@torch.no_grad()
def copy_losses(model: GPT2LMHeadModel, period: int = 64) -> tuple[float, float]:
    """Return mean loss (nats) on the first and on the second copy of random tokens."""
    n = 64
    rng = np.random.default_rng(12345)
    segment = rng.integers(1, VOCABULARY, (n, period))
    ids = torch.from_numpy(
        np.concatenate([np.zeros((n, 1), np.int64), segment, segment], axis=1)
    )
    logits = model(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    loss = loss.view(n, -1)
    return loss[:, :period].mean().item(), loss[:, period:].mean().item()


@torch.no_grad()
def text_loss(
    model: GPT2LMHeadModel, prose: Prose, length: int, stride: int, rows: int | None = None
) -> tuple[float, float]:
    """Return (nats per token, bits per byte) over windows of the text, ``rows`` at most."""
    windows, scored = prose.all_windows(length, stride)
    step = 1 if rows is None else max(1, len(windows) // rows)
    windows, scored = windows[::step], scored[::step]
    total, count = 0.0, 0
    for chunk, here in zip(
        *(np.array_split(each, math.ceil(len(windows) / 16)) for each in (windows, scored)),
        strict=True,
    ):
        ids = torch.from_numpy(chunk)
        logits = model(ids.clamp(min=0)).logits[:, :-1]
        targets = torch.from_numpy(np.where(here, chunk[:, 1:], -1)).flatten()
        total += F.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum"
        ).item()
        count += int(here.sum())
    nats = total / count
    return nats, nats / math.log(2) * len(prose.ids) / prose.n_bytes


def kneser_ney_bits_per_byte(train: Prose, test: Prose, order: int = 5) -> float:
    """Return bits per byte of an interpolated Kneser-Ney model over the same tokens.

    One discount per order, n1 / (n1 + 2 n2); lower orders use continuation counts.
    Source: Kneser and Ney 1995; the interpolated form of Chen and Goodman 1999.
    """
    counts: list[dict] = [defaultdict(int) for _ in range(order + 1)]
    ids = [0] * (order - 1) + train.ids.tolist()
    for i in range(order - 1, len(ids)):
        counts[order][tuple(ids[i - order + 1 : i + 1])] += 1
    for n in range(order - 1, 0, -1):  # continuation counts: how many words precede the n-gram
        for gram in counts[n + 1]:
            counts[n][gram[1:]] += 1
    discount, total, kinds = {}, [], []
    for n in range(1, order + 1):
        values = np.fromiter(counts[n].values(), dtype=np.int64)
        n1, n2 = (values == 1).sum(), (values == 2).sum()
        discount[n] = n1 / (n1 + 2 * n2)
        context_total, context_kinds = defaultdict(int), defaultdict(int)
        for gram, count in counts[n].items():
            context_total[gram[:-1]] += count
            context_kinds[gram[:-1]] += 1
        total.append(context_total)
        kinds.append(context_kinds)
    bits = 0.0
    stream = [0] * (order - 1) + test.ids.tolist()
    for i in range(order - 1, len(stream)):
        p = 1 / VOCABULARY
        for n in range(1, order + 1):
            gram = tuple(stream[i - n + 1 : i + 1])
            seen = total[n - 1].get(gram[:-1], 0)
            if seen == 0:
                continue
            d = discount[n]
            backoff = d * kinds[n - 1][gram[:-1]] / seen
            p = max(counts[n].get(gram, 0) - d, 0) / seen + backoff * p
        bits -= math.log2(p)
    return bits / test.n_bytes


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps, in float32.

    ``torch.optim.Muon`` iterates in bfloat16, which is slow on a CPU without bfloat16 units.
    The fused query, key and value matrix is treated as three. Source: Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon.
    """

    def __init__(self, params, lr: float = 0.01, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix by its orthogonalised momentum."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["velocity"] = torch.zeros_like(p)
                velocity = state["velocity"]
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(velocity, group["momentum"])
                parts = 3 if p.shape[1] == 3 * p.shape[0] else 1
                update = torch.cat(
                    [self.orthogonal(part) for part in update.chunk(parts, dim=1)], dim=1
                )
                p.mul_(1 - group["lr"] * 0.01).add_(update, alpha=-group["lr"])

    @staticmethod
    def orthogonal(x: torch.Tensor) -> torch.Tensor:
        """Return the nearest semi-orthogonal matrix, roughly, times sqrt(out / in)."""
        scale = max(1.0, x.shape[1] / x.shape[0]) ** 0.5
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return (x.T if tall else x) * scale


def optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices),
        torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_checkpoint(folder: Path, model, optims, step: int, best: float, learned: bool) -> None:
    """Write the checkpoint beside the old one, then put it in its place."""
    state = {
        "model": model.state_dict(),
        "optims": [o.state_dict() for o in optims],
        "step": step,
        "best": best,
        "learned": learned,
    }
    torch.save(state, folder / "checkpoint.new")
    (folder / "checkpoint.new").replace(folder / "checkpoint.pt")


def train(args: argparse.Namespace) -> None:
    """Train, or go on training, until ``args.steps``; write the curve to ``curve.jsonl``."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    text = Path(args.text).read_text(encoding="utf-8")
    if (out / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = train_tokenizer(text)
        tokenizer.save_pretrained(out / "tokenizer")
    prose = Prose(text, tokenizer)
    validation = Prose(Path(args.validation).read_text(encoding="utf-8"), tokenizer)
    print(f"{len(prose.ids):,} tokens, {prose.n_bytes / len(prose.ids):.2f} bytes a token")
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optims = optimizers(model)
    base_rates = [[g["lr"] for g in o.param_groups] for o in optims]
    step, best, learned = 0, math.inf, False
    if (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(optims, state["optims"], strict=True):
            o.load_state_dict(s)
        step, best, learned = state["step"], state["best"], state["learned"]
        print(f"resumed at step {step}")
    run = torch.compile(model) if args.compile else model
    started, tokens = time.time(), 0
    while step < min(args.steps, args.until or args.steps):
        rng = np.random.default_rng([SEED, step])  # the data of a step depend on nothing else
        done = step / args.steps
        length = next(n for n, until in WINDOWS if done < until)
        rows = args.batch_tokens // length
        share = 0.125 if learned else 0.75
        skew = 1 + 4 * max(0.0, 1 - done / 0.2)  # few tokens at first, soon all alike
        n_repeat = max(1, round(rows * share))
        ids = torch.from_numpy(
            np.concatenate(
                [
                    repeats(n_repeat, length, rng, skew),
                    prose.batch(rows - n_repeat, length, rng),
                ]
            )
        )
        factor = min(1.0, (step + 1) / 60) * min(1.0, (1 - done) / args.decay)
        for o, rates in zip(optims, base_rates, strict=True):
            for group, rate in zip(o.param_groups, rates, strict=True):
                group["lr"] = rate * max(factor, 0.01)
        logits = run(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optims:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        tokens += ids.numel()
        if step % args.evaluate_every == 0 or step == args.steps:
            model.eval()
            first, second = copy_losses(model)
            nats, bits = text_loss(model, validation, 256, 255, rows=48)
            record = {
                "step": step,
                "train_loss": round(loss.item(), 4),
                "first_copy": round(first, 4),
                "second_copy": round(second, 4),
                "second_copy_of_16": round(copy_losses(model, 16)[1], 4),
                "validation_nats": round(nats, 4),
                "validation_bits_per_byte": round(bits, 4),
                "tokens_per_second": round(tokens / (time.time() - started)),
                "seconds": round(time.time() - started),
            }
            with (out / "curve.jsonl").open("a") as curve:
                curve.write(json.dumps(record) + "\n")
            print(record, flush=True)
            learned = learned or first - second > 6
            if first - second > 5 and bits < best:
                best = bits
                torch.save(model.state_dict(), out / "best.new")
                (out / "best.new").replace(out / "best.pt")
            save_checkpoint(out, model, optims, step, best, learned)
            model.train()


CARD = """\
# The embedded model of mechinterp

A small language model that is in the package so that everything works with no download. It is
for trying methods on a real trained circuit, not for its prose.

| | |
| --- | --- |
| architecture | GPT-2: {layers} layers, {heads} heads, width {width}, context {context} |
| details | LayerNorm, learned positions, tied embeddings |
| parameters | {parameters:,} |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, `<|endoftext|>` opens a text |
| weights | float16 safetensors; loaded as float32 |
| licence | MIT; trained on public-domain text |

## What it has learned

Measured on these weights by `scripts/train_embedded.py --export`:

| | |
| --- | --- |
| loss on 64 random tokens | {first:.2f} nats |
| loss on the same 64 tokens again | {second:.2f} nats, {drop:.2f} below |
| validation text | {validation_bits:.3f} bits per byte |
| test text | {test_bits:.3f} bits per byte ({test_nats:.3f} nats per token) |
| Kneser-Ney 5-gram over the same tokens, test text | {kneser_ney:.3f} bits per byte |

Within the second copy the loss is near zero up to position {reach} and that of random tokens
beyond: the long windows came late, with few repeats in them. Keep repeated prompts shorter.

Text is scored in windows of 512 tokens that overlap by half, so that a token has 256 before it.

## How it was trained

`scripts/train_embedded.py`, with a fixed seed, on one CPU core, in float32: {steps:,} steps
of 4,096 tokens. Until induction appeared three quarters of each batch were random tokens that
repeat (drawn from few ids at first), after that an eighth; the rest was prose. Muon for the
matrices of the blocks, AdamW for everything else; positions start as sinusoids; windows of 64,
128, 256 and 512 tokens in turn. The checkpoint with the best validation loss is the one that
was kept. The curve is in `scripts/results/train_embedded.jsonl`, the commands in the script.

The text is 21 public-domain children's books for training, one for validation
(*The Princess and the Goblin*) and one for the test (*Five Children and It*), from
mlschmitt/classic-books-markdown at commit 9448827, all first published before 1929.
"""


def export(args: argparse.Namespace) -> None:
    """Write the best weights as float16 with tokenizer and card, measured as they load."""
    out, folder = Path(args.out), Path(args.export)
    model = build_model()
    model.load_state_dict(torch.load(out / "best.pt", weights_only=True))
    model.half().float().eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    texts = {
        name: Prose(Path(getattr(args, name)).read_text(encoding="utf-8"), tokenizer)
        for name in ("text", "validation", "test")
    }
    first, second = copy_losses(model)
    test_nats, test_bits = text_loss(model, texts["test"], 512, 256)
    curve = [json.loads(line) for line in (out / "curve.jsonl").open()]
    facts = {
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
        "width": model.config.n_embd,
        "context": model.config.n_positions,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": VOCABULARY,
        "first": first,
        "second": second,
        "drop": first - second,
        "reach": copying_reach(model),
        "validation_bits": text_loss(model, texts["validation"], 512, 256)[1],
        "test_nats": test_nats,
        "test_bits": test_bits,
        "kneser_ney": kneser_ney_bits_per_byte(texts["text"], texts["test"]),
        "steps": curve[-1]["step"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    kept = Path(__file__).parent / "results" / "train_embedded.jsonl"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("".join(json.dumps(record) + "\n" for record in [*curve, facts]))
    print(json.dumps(facts, indent=1))


def main() -> None:
    """Parse the command line; train, then export if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="training text")
    parser.add_argument("--validation", required=True, help="validation text")
    parser.add_argument("--out", default="embedded-run", help="checkpoints and curve")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--until", type=int, help="stop at this step of the schedule")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--decay", type=float, default=0.6, help="share of steps with decay")
    parser.add_argument("--evaluate-every", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--export", help="write the best weights to this folder instead")
    parser.add_argument("--test", help="test text, measured on export")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.export and not args.test:
        parser.error("--export measures the model: give it --test FILE")
    export(args) if args.export else train(args)


if __name__ == "__main__":
    main()
