"""Weights that Transformer Engine holds in FP8 (fp8_param_gather), and what they were rounded from.

A checkpoint's values are rounded as they are loaded. The optimizer wants them as they were, and so
does whoever exports a model that is not trained; until then they lie in host memory, where
Transformer Engine's own attribute has them and megatron.core looks for them. In training the
optimizer's main weights take their place (prism_megatron/training/main_weights.py).
"""

from __future__ import annotations

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor, nn

_KEPT = "_high_precision_init_val"
"""TransformerEngineBaseModule.reset_parameters gives it to a parameter, then of random values."""


def is_rounded(parameter: object) -> bool:
    """Whether a parameter's values are in FP8."""
    return bool(is_float8tensor(parameter))


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter, or an expert's part of one, these values; one in FP8 rounds them and keeps
    them besides."""
    if not is_rounded(parameter):
        parameter.copy_(values)
        return
    values = values.to(parameter.dtype)
    parameter.quantize_(values)  # type: ignore[operator]
    keep(parameter, values)


def keep(parameter: nn.Parameter, values: Tensor) -> None:
    """Keep in host memory what a parameter in FP8 was rounded from."""
    host = torch.empty(values.shape, dtype=parameter.dtype)
    setattr(parameter, _KEPT, host.copy_(values))


def forget(model: nn.Module) -> None:
    """Give up the host memory of all that is kept."""
    for parameter in model.parameters():
        if hasattr(parameter, _KEPT):
            delattr(parameter, _KEPT)


def value(parameter: nn.Parameter) -> Tensor:
    """The parameter's values as a plain tensor; of one in FP8 what it was rounded from, if that is
    kept."""
    if not is_rounded(parameter):
        return parameter.detach()
    kept: Tensor | None = getattr(parameter, _KEPT, None)
    if kept is not None:
        return kept.to(parameter.device)
    with torch.no_grad():
        rounded: Tensor = parameter.dequantize()
    return rounded
