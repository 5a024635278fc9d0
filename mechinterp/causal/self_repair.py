"""Self-repair: what later components make up for when a head is taken out.

The logit difference is a sum of what components write, divided by the final norm's scale. So
the total effect of an ablation splits without rest into the direct effect (the head's own
term, at the scale that the norm had), the change of every other component's own term, and the
rescaling of everything by the norm's new scale.

Source: McGrath et al. 2023, "The Hydra Effect", arXiv:2307.15771; Rushing and Nanda 2024,
"Explorations of Self-Repair in Language Models", arXiv:2402.15390 (the part of the norm).
"""

from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._progress import progress
from mechinterp.causal.ablation import captured_stand_ins
from mechinterp.causal.parts import Part, sets_of
from mechinterp.causal.self_repair_result import SelfRepair
from mechinterp.engine.calls import Memory
from mechinterp.hooks import HookManager
from mechinterp.lens.attribution import direct_logit_attribution
from mechinterp.record import convention_of
from mechinterp.tasks import Task, as_data

_LAST = "final bias"  # the one term that the norm does not scale


def self_repair(
    model: TransformerBridge,
    data: Any,
    heads: Any,
    *,
    kind: str = "zero",
    reference: Any = None,
    seed: int = 0,
    memory: Memory = None,
) -> SelfRepair:
    """Split what taking heads out does to the logit difference, and name what compensates.

    Args:
        model: Left as it was; raw weights of any norm, grouped queries and all.
        data: A ``Task``; what is split is the logit difference of its clean prompts (the
            answer's logit, without distractors), under a soft-cap that before the cap.
        heads: As in ``mi.head_ablation``: a list of pairs (layer, head), each by itself, or of
            such lists, each a set; None for every head by itself.
        kind: As there.
        reference: As there.
        seed: As there.
        memory: As there.

    Returns:
        ``direct``, the ``change`` of every component and ``rescaling``, per ``prompt`` and
        ``set``, in nats of log-odds; they add up to ``total``.

    Raises:
        TypeError: ``data`` is not a task.
        ValueError: As in ``mi.head_ablation`` and ``mi.direct_logit_attribution``: a model
            without an unembedding, or one that normalises after adding (BERT).

    Source: McGrath et al. 2023, arXiv:2307.15771; the norm's part: Rushing and Nanda 2024,
    arXiv:2402.15390.
    """
    task = as_data(data, (Task,), "self_repair")
    name = "logit" if task.distractors is None else "logit_diff"
    chosen = sets_of(model, "z", heads)
    intact = direct_logit_attribution(model, task, memory=memory)
    values = captured_stand_ins(model, task, kind, reference, "z", chosen.layers, seed)
    manager = HookManager(model)
    changes, rescalings, totals = [], [], []
    labels = intact.data["component"].values.tolist()
    scaled = np.array(labels) != _LAST
    for one in progress(chosen.sets, len(chosen.sets), "ablating heads"):
        with manager.edit(*values.edits(one), data=task):
            without = direct_logit_attribution(model, task, memory=memory)
        share = without.data["share"].values
        held = share.copy()
        held[:, scaled] *= (without.data["scale"] / intact.data["scale"]).values[:, None]
        changes.append(held - intact.data["share"].values)
        rescalings.append((share - held).sum(1))
        totals.append((without.data["attributed"] - intact.data["attributed"]).values)
    change, rescaling = np.stack(changes, 1), np.stack(rescalings, 1)
    own = np.array([[label in named for label in labels] for named in map(_names, chosen.sets)])
    arrays = {
        "total": (("prompt", "set"), np.stack(totals, 1)),
        "direct": (("prompt", "set"), np.where(own, change, 0.0).sum(-1)),
        "change": (("prompt", "set", "component"), np.where(own, np.nan, change)),
        "rescaling": (("prompt", "set"), rescaling),
        "intact": ("prompt", intact.data["attributed"].values),
    }
    coords = {
        name: intact.data[name]
        for name in ("prompt", "template", "case", "kind", "layer", "head", "component")
        if name in intact.data.coords
    }
    unit = intact.convention.metrics[name]
    return SelfRepair(
        xr.Dataset(arrays, coords | {"set": chosen.labels}),
        convention_of(
            "self_repair",
            model,
            task,
            {name: unit},
            intact.convention.fingerprint,
            {
                "kind": kind,
                "final_norm": "held at the scale it had; its change is the rescaling",
                "attributed": intact.convention.settings["attributed"],
            },
            site="z",
            positions="answer",
            ablation=kind,
            seed=seed if kind == "resample" else None,
        ),
    )


def _names(parts: list[Part]) -> set[str]:
    return {part.label for part in parts}
