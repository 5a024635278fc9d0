"""Matrix products by oneDNN, where MKL leaves half of the processor's width unused.

torch multiplies float32 matrices by MKL, which keeps to 256-bit instructions on processors
that are not Intel's. oneDNN, which comes with torch too, takes the 512-bit ones of AMD's: on a
Zen 5 processor twice as fast (`scripts/bench_products.py`). The sums are taken in another
order, so results differ by rounding; plain runs, which the engine is checked against, stay with
MKL.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Below so many multiplications the call takes longer than it saves; for fewer rows than these,
# so does reading the weights, or copying them.
_LEAST, _ROWS, _ROWS_TO_COPY = 2**22, 16, 512
_CPU = torch.device("cpu")


@contextmanager
def fast_products() -> Iterator[None]:
    """Take oneDNN for large float32 products while the block (or function) runs.

    Only without gradients, on a processor where it pays, and while
    ``torch.backends.mkldnn.enabled``.
    """
    if mkl_is_held_back() and torch.backends.mkldnn.enabled and not torch.is_grad_enabled():
        with _OneDnn():
            yield
    else:
        yield


@cache
def mkl_is_held_back() -> bool:
    """Return whether this is an AMD processor with 512-bit instructions, and torch has both."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = platform.processor()
    return "AuthenticAMD" in said


class _OneDnn(TorchFunctionMode):
    """Does ``linear`` and ``addmm`` (that of GPT-2's layers) by oneDNN."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear and not kwargs and len(args) in (2, 3):
            x, weight, bias = args if len(args) == 3 else (*args, None)
        elif func is torch.addmm and not kwargs and len(args) == 3:
            bias, x, weight = args[0], args[1], args[2].t()
        else:
            return func(*args, **(kwargs or {}))
        if _pays(x, weight) and (bias is None or bias.shape == weight.shape[:1]):
            # Of other strides than these oneDNN makes plain loops.
            weight = weight if weight.t().is_contiguous() else weight.contiguous()
            return torch.ops.mkldnn._linear_pointwise(
                x.contiguous(), weight, bias, "none", [], ""
            )
        return func(*args)


def _pays(x: Tensor, weight: Tensor) -> bool:
    if not (x.dtype == weight.dtype == torch.float32 and x.device == weight.device == _CPU):
        return False
    rows = x.numel() // x.shape[-1]
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return rows >= (_ROWS if dense else _ROWS_TO_COPY) and rows * weight.numel() >= _LEAST
