"""Healing: a short fine-tune after pruning, so that what is left takes over."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mechinterp import inference, plotting, stats
from mechinterp._progress import progress
from mechinterp.causal.grid import prompt_labels
from mechinterp.engine.calls import check_answers
from mechinterp.engine.runs import run_of
from mechinterp.heads.gates import batches
from mechinterp.heads.gradient import Objective, objective
from mechinterp.heads.held_out import held_out
from mechinterp.metrics import METRICS, resolve_metrics
from mechinterp.models import fingerprint, forward
from mechinterp.models.pruned.copying import copied, wrapped_like
from mechinterp.record import Data, convention_of, digest
from mechinterp.results import Result
from mechinterp.tasks import Prompts

_WARM_UP = 0.1  # of the steps
_CLIP = 1.0
_EVALUATED = 16  # prompts at once


@dataclass(frozen=True, eq=False)
class HealingCurve(Result):
    """The metric on held-out prompts as the model heals.

    ``data["value"]`` has the axes ``step`` (updates done, from 0 on) and ``prompt``;
    ``data["loss"]``, on ``update``, is the loss of each batch, in nats.
    """

    @property
    def effect(self) -> xr.DataArray:
        """The metric minus what it was before the first update."""
        value = self.data["value"]
        return (value - value.isel(step=0, drop=True)).rename("effect")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the mean of the metric against updates, with its 95 % interval over prompts."""
        ax = ax if ax is not None else plotting.new_axes(4.6, 3.0)
        value = inference.per_case(self.data["value"]).transpose("step", "prompt")
        x, colour = self.data["step"].values, plotting.COLOURS[0]
        ax.plot(x, value.mean("prompt"), color=colour, marker="o", markersize=4)
        n = value.sizes["prompt"]
        if n > 1:
            ends = stats.bootstrap_interval(value.values)
            ax.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0)
        name, unit = next(iter(self.convention.metrics.items()))
        ax.set_xlabel("updates")
        ax.set_ylabel(f"{name} ({unit})" if unit else name)
        ax.spines[["top", "right"]].set_visible(False)
        note = "band: 95 % interval" if n > 1 else "one prompt: no interval"
        prompts = f"{n} prompt{'s' if n > 1 else ''}"
        plotting.title(ax, f"healing · {self.convention.data}, {prompts}", note)
        return ax


@dataclass(frozen=True, eq=False)
class Healed:
    """The model after its fine-tune, and the curve from before to after."""

    model: TransformerBridge
    curve: HealingCurve


def heal(
    model: TransformerBridge,
    data: Any,
    *,
    evaluate_on: Any = None,
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    lora_rank: int | None = None,
    metric: Any = None,
    evaluations: int = 5,
    seed: int = 0,
) -> Healed:
    """Fine-tune a copy of the model for a few steps.

    AdamW on the loss, with a tenth of the steps to warm up, a linear way down and gradients
    clipped at 1. Dropout is off.

    Args:
        model: Left as it was; pruned or not.
        data: What to train on: a ``Text``, ``Labelled`` texts or a ``Task``.
        evaluate_on: Other data of the same kind, for the curve. By default a tenth of
            ``data`` (at least one prompt) is kept from training for it.
        steps: Updates.
        batch_size: Prompts of an update.
        learning_rate: The highest.
        weight_decay: Of AdamW.
        lora_rank: Train low-rank changes of this rank (Hu et al. 2021, arXiv:2106.09685) and
            add them to the weights at the end, instead of all weights. Needs ``peft``:
            ``pip install 'mechinterp-toolkit[lora]'``.
        metric: What the curve shows. Default: the data's own.
        evaluations: How many points the curve has after its first.
        seed: Of the order of prompts, and of what LoRA begins with.

    Returns:
        The healed model, and the curve of the metric over the updates.

    Raises:
        TypeError: ``data`` is none of these, or ``evaluate_on`` of another kind.
        ValueError: Too little data, a size below 1, or ``evaluate_on`` is what it trains on;
            LoRA on a native model.
        ImportError: ``peft`` is wanted and not there.
    """
    training, judging = held_out(data, evaluate_on, 0.1, "heal")
    sizes = {"steps": steps, "batch_size": batch_size, "evaluations": evaluations}
    if small := [name for name, size in sizes.items() if size < 1]:
        raise ValueError(f"{small[0]}={sizes[small[0]]} must be at least 1.")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} must be positive.")
    for each in (training, judging):
        check_answers(model, each)
    metrics = resolve_metrics(metric, training.metric)
    if len(metrics) > 1:
        raise ValueError("the curve shows one metric. Pass one.")
    module, cfg = copied(model)
    trained: Any = module
    bridge = None
    if not isinstance(module, PreTrainedModel):
        if lora_rank is not None:
            raise ValueError(
                "LoRA trains Hugging Face models, and this one is native. Leave lora_rank out."
            )
        trained = bridge = wrapped_like(model, module, cfg)
    elif lora_rank is not None:
        trained = _with_lora(module, lora_rank, seed)
    run = run_of(training, "clean")
    measured = objective(model, training, {"loss": METRICS["loss"]})
    judged = _Judged(
        judging, objective(model, judging, metrics), run_of(judging, "clean").prompts
    )
    parameters = [p for p in trained.parameters() if p.requires_grad or lora_rank is None]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda at: _share(at, steps))
    generator = torch.Generator().manual_seed(seed)
    drawn = batches(len(training), batch_size, generator)
    marks = sorted({round(i * steps / evaluations) for i in range(evaluations + 1)})
    values, losses = [judged(trained)], []
    for step in progress(range(1, steps + 1), steps, "healing"):
        numbers = next(drawn)
        with torch.enable_grad():
            logits = _logits(trained, run.prompts[numbers])
            loss = measured(logits, numbers).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step in marks:
            values.append(judged(trained))
    if lora_rank is not None:
        trained = trained.merge_and_unload()
    healed = bridge if bridge is not None else wrapped_like(model, trained.eval(), cfg)
    coords: dict[str, Any] = {"step": marks, "update": np.arange(1, steps + 1)}
    arrays = {"value": (("step", "prompt"), np.stack(values)), "loss": ("update", losses)}
    settings = {
        **sizes,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "lora_rank": lora_rank,
        "trained_on": {"name": training.name, "sha256": digest(training)},
        "healed_fingerprint": fingerprint(healed),
    }
    curve = HealingCurve(
        xr.Dataset(arrays, coords | prompt_labels(judging)),
        convention_of("heal", model, judging, metrics, fingerprint(model), settings, seed=seed),
    )
    return Healed(healed, curve)


@dataclass(frozen=True, eq=False)
class _Judged:
    """Measures held-out prompts, a few at once."""

    data: Data
    measured: Objective
    prompts: Prompts

    @torch.no_grad()
    def __call__(self, trained: Any) -> Float[np.ndarray, " prompt"]:
        parts = []
        for start in range(0, len(self.data), _EVALUATED):
            numbers = list(range(start, min(start + _EVALUATED, len(self.data))))
            logits = _logits(trained, self.prompts[numbers])
            parts.append(self.measured(logits, numbers))
        return torch.cat(parts).numpy()


def _logits(trained: Any, prompts: Prompts) -> Tensor:
    if isinstance(trained, TransformerBridge):
        return forward(trained, prompts.tokens, prompts.mask)
    device = next(trained.parameters()).device
    out = trained(
        input_ids=prompts.tokens.to(device), attention_mask=prompts.mask.long().to(device)
    ).logits
    return out if out.ndim == 3 else out[:, None]


def _share(at: int, steps: int) -> float:
    """Return which share of the highest learning rate an update has."""
    warm = max(1, round(_WARM_UP * steps))
    return (at + 1) / warm if at < warm else (steps - at) / max(1, steps - warm)


def _with_lora(module: PreTrainedModel, rank: int, seed: int) -> nn.Module:
    if rank < 1:
        raise ValueError(f"lora_rank={rank} must be at least 1.")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "lora_rank needs peft. Install it with pip install 'mechinterp-toolkit[lora]', or "
            "leave lora_rank out to train all weights."
        ) from error
    turned = any(isinstance(part, Conv1D) for part in module.modules())  # GPT-2
    wanted = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=turned
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers old names
        torch.manual_seed(seed)
        return get_peft_model(module, wanted)
