"""Reading: from logits at the answers to what is asked for, a few rows at a time.

Running text is answered everywhere: each token is the answer where the one before it stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.metrics import OF_TARGETS, Metric, Targets, apply_metric, kl, try_metric
from mechinterp.tasks import Prompts


@dataclass(frozen=True, eq=False)
class Reader:
    """What is read off the logits of a row: metrics, or (without any) the logits themselves.

    ``vocabulary`` are the only tokens whose logits are needed, None for all. Without
    ``by_row`` a metric may look at all prompts together, so it is called once per cell. With
    ``text``, rows have logits at every position, and a row's value is the mean over its tokens.
    """

    metrics: Mapping[str, Metric]
    targets: Targets | None
    vocabulary: Int[Tensor, " token"] | None = None
    by_row: bool = True
    text: Prompts | None = None

    def read(
        self, logits: Float[Tensor, "row *pos d_vocab"], prompts: Sequence[int]
    ) -> Float[Tensor, "row value"]:
        """Return one value per row and metric, in float64; ``prompts`` says whose row it is.

        Raises:
            ValueError: A metric has a wrong shape, or is NaN or infinite.
        """
        if not self.metrics:
            return logits.detach().cpu()
        if self.text is not None:
            return self._over_tokens(logits, self.text[list(prompts)], prompts)
        assert self.targets is not None
        targets = _chosen(self.targets, list(prompts))
        if self.vocabulary is not None:
            targets = _renumbered(targets, self.vocabulary)
        columns = [
            apply_metric(name, fn, logits, targets, prompts).double().cpu()
            for name, fn in self.metrics.items()
        ]
        return torch.stack(columns, dim=1)

    def _over_tokens(
        self,
        logits: Float[Tensor, "row pos d_vocab"],
        text: Prompts,
        prompts: Sequence[int],
    ) -> Float[Tensor, "row value"]:
        """Return the metrics' means over the tokens that something stands before."""
        row, pos = text.mask[:, 1:].nonzero(as_tuple=True)
        targets = Targets(text.tokens[row, pos + 1, None].to(logits.device))
        whose = [prompts[i] for i in row.tolist()]
        counts = torch.bincount(row, minlength=len(text)).double()
        columns = []
        at_once = logits[row.to(logits.device), pos.to(logits.device)]
        for name, fn in self.metrics.items():
            each = apply_metric(name, fn, at_once, targets, whose).double().cpu()
            columns.append(torch.zeros(len(text), dtype=torch.float64).index_add(0, row, each))
        return torch.stack(columns, dim=1) / counts[:, None]


def text_reader(metrics: Mapping[str, Metric], text: Prompts, d_vocab: int) -> Reader:
    """Return a reader of running text, after trying the metrics on made-up logits.

    Raises:
        ValueError: A metric needs distractors or another run, or compares tokens; or a piece
            of the text is a single token.
    """
    for name, fn in metrics.items():
        if fn is kl:
            raise ValueError(
                f"metric {name!r} compares with another run's logits, which are not kept for "
                "running text. Use 'loss', 'log_prob', 'accuracy' or 'rank'."
            )
    if alone := [i for i, n in enumerate(text.lengths.tolist()) if n < 2]:
        raise ValueError(
            f"piece {alone[0]} of the text is one token, so there is nothing to predict in it. "
            "Leave it out, or cut the text into longer pieces."
        )
    tried = reader(metrics, Targets(text.tokens[:4, 1:2]), d_vocab, partial=False)
    if not tried.by_row:
        names = ", ".join(metrics)
        raise ValueError(
            f"on running text a metric is taken token by token, but one of {names} compares "
            "rows. Use one that looks at each row of logits by itself."
        )
    return Reader(metrics, None, text=text)


def reader(
    metrics: Mapping[str, Metric], targets: Targets, d_vocab: int, *, partial: bool
) -> Reader:
    """Return a reader, after trying the metrics on made-up logits.

    Args:
        metrics: What to measure, by name.
        targets: What the logits are compared with.
        d_vocab: How many logits a row has.
        partial: Whether the model can give the logits of some tokens alone.

    Raises:
        ValueError: A metric returns a wrong shape, before any forward pass.
    """
    generator = torch.Generator().manual_seed(0)
    n = len(targets.answers)
    logits = torch.randn(n, d_vocab, generator=generator)
    reference = torch.randn(n, d_vocab, generator=generator)
    tried = replace(targets, reference=reference)
    by_row = True
    for name, fn in metrics.items():
        whole = try_metric(name, fn, logits, tried)
        rows = [*range(n), 0][::-1]
        try:
            some = try_metric(name, fn, logits[rows], _chosen(tried, rows))
            by_row &= torch.allclose(some, whole[rows], rtol=1e-4, atol=1e-5, equal_nan=True)
        except Exception:
            by_row = False
    vocabulary = None
    if partial and all(any(fn is known for known in OF_TARGETS) for fn in metrics.values()):
        named = [targets.answers, targets.distractors]
        tokens = torch.cat([t.flatten() for t in named if t is not None])
        vocabulary = tokens[tokens >= 0].unique()
        if len(vocabulary) > d_vocab // 4:
            vocabulary = None
    return Reader(metrics, targets, vocabulary, by_row)


def _chosen(targets: Targets, rows: list[int]) -> Targets:
    distractors = None if targets.distractors is None else targets.distractors[rows]
    reference = None if targets.reference is None else targets.reference[rows]
    return Targets(targets.answers[rows], distractors, reference)


def _renumbered(targets: Targets, vocabulary: Int[Tensor, " token"]) -> Targets:
    """Return the targets as columns of logits over ``vocabulary`` alone."""
    sets = [
        None if t is None else torch.where(t < 0, -1, torch.searchsorted(vocabulary, t))
        for t in (targets.answers, targets.distractors)
    ]
    assert sets[0] is not None
    return Targets(sets[0], sets[1])
