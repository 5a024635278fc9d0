"""The tuned lens: a translator per layer, fitted to say what the model will say in the end.

A layer keeps its states in a basis of its own; the logit lens reads them all in the last one.
The tuned lens first moves them there, by ``h + h @ weight + bias``, and then uses the model's
own closing. One translator per layer's input (``resid_pre``); the last ``resid_post`` has none.

Source: Belrose et al. 2023, arXiv:2303.08112. Departures: Adam instead of SGD, and text of the
user's choice.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from mechinterp._files import written_beside
from mechinterp.models import fingerprint, input_device

if TYPE_CHECKING:
    from mechinterp.lens.evaluation import LensEvaluation

FORMAT = "mechinterp tuned lens 1"
SITES = ("resid_pre", "resid_post")


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Affine translators of one model, one per layer's input.

    Attributes:
        weight: What is added per unit of state, ``x @ weight``; zero is the logit lens.
        bias: What is added to every state.
        history: KL(final ‖ lens) in nats per token, of every step's batch, before the step.
        info: The model and its fingerprint, the text, and how it was fitted.
    """

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    history: Float[Tensor, "step layer"]
    info: Mapping[str, Any]

    @classmethod
    def fit(
        cls,
        model: TransformerBridge,
        data: Any,
        *,
        steps: int = 250,
        tokens: int = 1024,
        rate: float = 1e-3,
        seed: int = 0,
        checkpoint: str | PathLike[str] | None = None,
        every: int = 25,
        memory: int | float | str | None = None,
    ) -> "TunedLens":
        """Fit translators to KL(final ‖ lens) on a text, from the identity.

        Each step runs the model once on some pieces of the text and uses what it kept for
        all layers. Repeatable: the same arguments give the same lens, interrupted or not.

        Args:
            model: Left as it was.
            data: A ``Text``. Some hundred thousand tokens like those to be read are plenty.
            steps: How many batches.
            tokens: How many tokens a batch has, about.
            rate: Adam's first learning rate; it falls to 0 in a straight line.
            seed: Which pieces make up which batch.
            checkpoint: A file to keep the state of the fit in. Where it exists already, the
                fit goes on from there.
            every: After how many steps the checkpoint is written.
            memory: Bytes, or a size such as ``"2GB"``, to take beside the model.

        Returns:
            The lens, a weight and a bias per place.

        Raises:
            TypeError: ``data`` is not a text.
            ValueError: The model has no unembedding; a number is not positive; the checkpoint
                belongs to another fit; the memory is too small for one piece.

        Source: Belrose et al. 2023, arXiv:2303.08112; here Adam instead of SGD.
        """
        from mechinterp.lens.fitting import Fit

        return Fit(model, data, steps, tokens, rate, seed, memory).run(checkpoint, every)

    @property
    def name(self) -> str:
        """What results call this lens."""
        return f"tuned ({self.info['data']}, {self.info['steps']} steps)"

    def check(self, model: TransformerBridge, site: str = "resid_pre") -> None:
        """Raise an error unless the lens was fitted on ``model``, for ``site``.

        Raises:
            ValueError: It was fitted on another model, or for other sites.
        """
        if (found := fingerprint(model)) != self.info["fingerprint"]:
            raise ValueError(
                f"this tuned lens was fitted on {self.info['model']} with fingerprint "
                f"{str(self.info['fingerprint'])[:12]}…, but the model is "
                f"{model.cfg.model_name} with {found[:12]}…. Fit one on this model."
            )
        if site not in SITES:
            raise ValueError(
                f"a tuned lens reads {' or '.join(SITES)}, not {site}. Leave lens out there."
            )

    def translate(
        self, states: Float[Tensor, "row d_model"], site: str, layer: int
    ) -> Float[Tensor, "row d_model"]:
        """Return states of a layer in the basis of the last one.

        Args:
            states: Of the residual stream.
            site: ``"resid_pre"`` or ``"resid_post"``.
            layer: Of the states.
        """
        index = layer + (site == "resid_post")
        if index == len(self.weight):
            return states
        return translated(states, self.weight[index], self.bias[index])

    def evaluate(
        self,
        model: TransformerBridge,
        data: Any,
        *,
        memory: int | float | str | None = None,
    ) -> "LensEvaluation":
        """Compare the lens with the logit lens on a ``Text``, best one it was not fitted on.

        Args:
            model: The one that the lens was fitted on.
            data: A ``Text``.
            memory: Bytes, or a size such as ``"2GB"``, to take beside the model.

        Returns:
            The loss of either lens per layer and prompt, in nats per token.

        Raises:
            TypeError: ``data`` is not a text.
            ValueError: The lens belongs to another model, or the model predicts no next token.
        """
        from mechinterp.lens.evaluation import evaluated

        return evaluated(self, model, data, memory)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a safetensors file, completely or not at all; return the path."""
        tensors = {"weight": self.weight, "bias": self.bias, "history": self.history}
        write(path, FORMAT, tensors, self.info)
        return Path(path)

    @classmethod
    def load(cls, path: str | PathLike[str], model: TransformerBridge) -> "TunedLens":
        """Return the lens that ``save`` wrote to ``path``, fitted on this ``model``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a tuned lens, or was fitted on another model.
        """
        tensors, info = read(path, FORMAT)
        lens = cls(tensors["weight"], tensors["bias"], tensors["history"], info)
        lens.check(model)
        device = input_device(model)
        return cls(lens.weight.to(device), lens.bias.to(device), lens.history, info)

    def __repr__(self) -> str:
        layers, d_model = self.bias.shape
        return (
            f"TunedLens({self.info['model']}: {layers} translators of width {d_model}, "
            f"{self.info['steps']} steps on {self.info['data']})"
        )


def translated(
    states: Float[Tensor, "row d_model"],
    weight: Float[Tensor, "d_model d_model"],
    bias: Float[Tensor, " d_model"],
) -> Float[Tensor, "row d_model"]:
    """Return ``states + states @ weight + bias``, in the states' own dtype."""
    precise = states.to(weight.dtype)
    return (precise + precise @ weight + bias).to(states.dtype)


def write(
    path: str | PathLike[str], kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Write tensors with a JSON header as safetensors, completely or not at all."""
    with written_beside(path) as part:
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, part, {"format": kind, "info": json.dumps(dict(info))})


def read(path: str | PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header that `write` wrote under this kind.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is something else, or cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as store:
            header = store.metadata() or {}
            tensors = {name: store.get_tensor(name) for name in store.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or not a safetensors file ({error}).") from error
    if header.get("format") != kind:
        raise ValueError(
            f"{path} is a safetensors file, but its format is {header.get('format')!r}, not "
            f"{kind!r}."
        )
    return tensors, json.loads(header["info"])
