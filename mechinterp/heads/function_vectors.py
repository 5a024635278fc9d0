"""Function vectors: what a few heads write at the end of a few-shot prompt, as one vector.

Some heads carry the relation that the examples show. They are found by what their mean output
over true prompts does in prompts whose labels are shuffled, where the relation is gone: the
average indirect effect. The sum of what the strongest write is the function vector; added to
the residual stream it makes the model apply the relation with no example at all.

Source: Todd et al. 2023, arXiv:2310.15213, sections 2.2 and 2.3.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.activations import Activations
from mechinterp.edits import Mean
from mechinterp.engine.calls import Memory, metrics_of_cells
from mechinterp.engine.cells import Cell
from mechinterp.heads.examples import check_enough, drawn_texts
from mechinterp.heads.few_shot import check_causal
from mechinterp.heads.function_vector import FunctionVector, IndirectEffects, head_grid
from mechinterp.heads.written import check_writes_are_sums, mean_written
from mechinterp.hooks import HookManager
from mechinterp.metrics import METRICS
from mechinterp.record import convention_of
from mechinterp.sites import n_heads as count_heads
from mechinterp.sites import resolve_layers
from mechinterp.tasks import Task
from mechinterp.tasks.pairs import FORMAT, Pairs, as_pairs, check_format, tokenise_answered
from mechinterp.tasks.prompts import Prompts


def function_vector(
    model: TransformerBridge,
    data: Any,
    *,
    shots: int = 10,
    n_prompts: int = 50,
    n_heads: int = 10,
    layers: int | Sequence[int] | None = None,
    held_out: int | float = 0.3,
    template: str = FORMAT,
    seed: int = 0,
    memory: Memory = None,
) -> FunctionVector:
    """Return the function vector of a relation, and the indirect effect of every head.

    ``held_out`` of the pairs are set aside under ``seed`` for ``FunctionVector.evaluate``; the
    others give queries and examples. Over ``n_prompts`` true prompts each head's ``z`` at the
    last token is averaged. Put into as many prompts with shuffled labels, one head at a time,
    it changes the probability of the right answer's first token; the mean change is the head's
    average indirect effect. The vector is the sum over the ``n_heads`` strongest heads of what
    their mean ``z`` writes to the residual stream, behind a norm of the attention's output
    (Gemma) with that norm's scale as it was. All prompts count, whether the model gets them
    right or not.

    Args:
        model: A causal language model with a tokenizer; query heads under grouped queries.
        data: Pairs of words, as in ``mi.few_shot``.
        shots: Examples in each prompt, at least 2.
        n_prompts: Prompts of each kind; queries repeat where there are fewer pairs.
        n_heads: How many heads the vector sums. ``FunctionVector.of_heads`` sums others.
        layers: Layers whose heads are tried; all by default. Heads of the last ones may answer
            by themselves: what they write helps little further down.
        held_out: Share of the pairs, or (1 or more) their number.
        template: The format, with ``{input}`` and ``{output}``.
        seed: Of split, queries, examples and labels.
        memory: As in ``mi.activation_patching``.

    Raises:
        TypeError: ``data`` is no pairs of words.
        ValueError: Too few pairs or heads, no tokenizer, prompts longer than the context, a
            model that is not causal, or one whose attention is normed after it is added.

    Source: Todd et al. 2023, arXiv:2310.15213, sections 2.2 and 2.3.
    """
    pairs = as_pairs(data, "function_vector")
    check_causal(model, "function_vector")
    check_format(template)
    check_writes_are_sums(model)
    tried = [at for at in resolve_layers(model, "z", layers) if at is not None]
    heads = [(at, head) for at in tried for head in range(count_heads(model, "z", at))]
    if shots < 2 or n_prompts < 1 or not 1 <= n_heads <= len(heads):
        raise ValueError(
            f"shots={shots}, n_prompts={n_prompts}, n_heads={n_heads}: pass at least 2 "
            f"examples (labels are shuffled among them), 1 prompt, and 1 to {len(heads)} heads."
        )
    train, kept = _split(pairs, held_out, seed)
    check_enough(train, shots)
    clean, answers = _prompts(model, train, n_prompts, shots, "true", template, seed)
    shuffled, _ = _prompts(model, train, n_prompts, shots, "shuffled_labels", template, seed)
    task = Task(f"{pairs.name}, labels shuffled", shuffled, answers, metric="prob")

    manager = HookManager(model)
    means = _mean_z(manager, clean)
    cells = [
        Cell(Mean("z", means, layers=layer, heads=head, positions="end"))
        for layer, head in heads
    ]
    metrics = {"prob": METRICS["prob"]}
    found = metrics_of_cells(model, task, cells, on="clean", metrics=metrics, memory=memory)
    convention = convention_of(
        "function_vector",
        model,
        task,
        metrics,
        found.fingerprint,
        {
            "shots": shots,
            "n_prompts": n_prompts,
            "template": template,
            "train": [list(row) for row in train],
            "held_out": [list(row) for row in kept],
            "answer": "first token",
            "path": found.path,
        },
        site="z",
        direction="denoising",
        positions="end",
        ablation="mean over true prompts, at the last token",
        seed=seed,
    )
    patched, base = found.values[..., 0].cpu().numpy(), found.runs["clean"][:, 0].cpu().numpy()
    effects = IndirectEffects(head_grid(heads, patched, base), convention)
    return FunctionVector(
        effects,
        mean_written(manager, clean),
        mean_written(manager, shuffled),
        tuple(effects.strongest(n_heads)),
    )


def _split(pairs: Pairs, held_out: int | float, seed: int) -> tuple[Pairs, Pairs]:
    """Return the pairs to learn from and those set aside; no input is in both."""
    inputs = list(dict.fromkeys(question for question, _ in pairs))
    count = round(held_out * len(inputs)) if held_out < 1 else int(held_out)
    if not 1 <= count < len(inputs):
        raise ValueError(
            f"held_out={held_out} sets {count} of {len(inputs)} words aside. Leave at least "
            "one on either side."
        )
    order = np.random.default_rng([seed, 1]).permutation(len(inputs))
    aside = {inputs[i] for i in order[:count]}
    index = range(len(pairs))
    return (
        pairs[[i for i in index if pairs[i][0] not in aside]],
        pairs[[i for i in index if pairs[i][0] in aside]],
    )


def _prompts(
    model: TransformerBridge,
    train: Pairs,
    n: int,
    shots: int,
    condition: str,
    template: str,
    seed: int,
) -> tuple[Prompts, torch.Tensor]:
    """Return few-shot prompts and the first token of each answer.

    Both conditions ask the same queries; each prompt draws its examples anew.
    """
    rng = np.random.default_rng([seed, 2])
    rounds = -(-n // len(train))
    queries = np.concatenate([rng.permutation(len(train)) for _ in range(rounds)])[:n].tolist()
    texts = [
        drawn_texts([query], train, shots, condition, template=template, seed=seed + 1 + number)
        for number, query in enumerate(queries)
    ]
    answered = tokenise_answered(model, [text for (text,) in texts])
    return answered.asked, torch.tensor([[row[0]] for row in answered.answers])


def _mean_z(manager: HookManager, clean: Prompts) -> Activations:
    """Return each head's mean ``z`` at the last token, as what ``Mean`` reads."""
    acts = manager.capture(clean, "z", positions=-1)
    means = {
        key: values.double().mean(0, keepdim=True).to(values.dtype)
        for key, values in acts.items()
    }
    return replace(acts, stored=means, index=torch.zeros(1, 1, dtype=torch.long), lengths=(1,))
