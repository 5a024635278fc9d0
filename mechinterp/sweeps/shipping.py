"""A model on its way to other processes: its structure as bytes, its weights as arrays.

Ray keeps arrays in its object store, once per machine, and workers there read the same memory;
nothing is loaded from files again. Both ends are processes of one run: what is unpickled here
never comes from a file or from a spec.
"""

import io
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Shipped:
    """A bridge without its tensors, and the tensors' bytes, shapes and dtypes in order."""

    structure: bytes
    arrays: tuple[np.ndarray, ...]
    about: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(array.nbytes for array in self.arrays)


def packed(model: TransformerBridge) -> Shipped:
    """Return a model ready to be shipped; it stays as it was."""
    out = io.BytesIO()
    pickler = _Pickler(out)
    pickler.dump(model)
    return Shipped(out.getvalue(), tuple(pickler.arrays), tuple(pickler.about))


def unpacked(shipped: Shipped, device: str | None = None) -> TransformerBridge:
    """Return the model that was packed; on the CPU it shares the memory of the arrays."""
    with warnings.catch_warnings():
        # The memory is other workers' too, and read-only; nothing here writes to weights.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        model: TransformerBridge = _Unpickler(shipped).load()
    return model if device is None else model.to(device)


class _Pickler(cloudpickle.Pickler):
    def __init__(self, out: io.BytesIO) -> None:
        super().__init__(out, protocol=5)
        self.arrays: list[np.ndarray] = []
        self.about: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
        self._seen: dict[int, tuple[int, torch.Tensor]] = {}

    def persistent_id(self, obj: Any) -> int | None:
        """Return the number of a tensor, which is kept apart; tied ones have one number."""
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._seen:
            plain = obj.detach().cpu().contiguous()
            flat = plain.reshape(-1).view(torch.uint8) if plain.numel() else plain
            self._seen[id(obj)] = len(self.arrays), obj
            self.arrays.append(flat.numpy() if plain.numel() else np.empty(0, np.uint8))
            self.about.append((tuple(obj.shape), obj.dtype, isinstance(obj, nn.Parameter)))
        return self._seen[id(obj)][0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, shipped: Shipped) -> None:
        super().__init__(io.BytesIO(shipped.structure))
        self._shipped = shipped
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: int) -> torch.Tensor:
        """Return the tensor of that number, over the memory of its array."""
        if pid not in self._made:
            shape, dtype, is_parameter = self._shipped.about[pid]
            flat = torch.from_numpy(self._shipped.arrays[pid])
            found = (
                flat.view(dtype).reshape(shape)
                if flat.numel()
                else torch.empty(shape, dtype=dtype)
            )
            self._made[pid] = nn.Parameter(found, False) if is_parameter else found
        return self._made[pid]
