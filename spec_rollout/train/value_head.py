"""The value head of algorithms with a critic: what reward a position promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ValueHead(torch.nn.Module):
    """A linear function of the hidden state that the policy's output head reads; at first 0.

    Args:
        model: The policy; the head is put on its device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head: Any = model.get_output_embeddings()
        size, device = head.weight.shape[1], head.weight.device
        self.weight = torch.nn.Parameter(torch.zeros(1, size, dtype=torch.float32, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size], any floating type -> [num_tokens], float32."""
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias).squeeze(-1)
