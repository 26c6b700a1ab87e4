"""Numbers that are none: where NaN and infinity stand in weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def nonfinite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Says which tensor holds NaN or infinity, and how many of them; None if none does.

    One read of the tensors, and one wait for the device, as long as all is well.
    """
    tensors = {name: tensor.detach() for name, tensor in named if tensor.numel()}
    # A norm is finite only if all it is of is. The converse is not true: it may overflow.
    if math.isfinite(float(torch.nn.utils.get_total_norm(tensors.values()))):
        return None
    for name, tensor in tensors.items():
        bad = tensor[~torch.isfinite(tensor)]
        if bad.numel():
            what = "NaN" if bool(bad.isnan().any()) else "infinity"
            return f"{what} in {name} ({bad.numel()} of {tensor.numel()} numbers)"
    return None
