"""The optimiser: Muon for the layers' matrices, AdamW for everything else.

Muon (Jordan, 2024) makes each matrix's momentum orthogonal by a Newton-Schulz iteration; scaled as
by Liu et al. (2025, "Muon is scalable for LLM training"), so that both parts take one learning
rate. Matrices of one shape are treated as one stack: the network has many and they are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, nearly, to a stack (k, rows, cols)."""
    x = stack.bfloat16() if stack.is_cuda else stack
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = _A * x + (_B * a + _C * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Both optimisers behind one learning rate."""

    def __init__(self, model: nn.Module, decay: float = 0.05, momentum: float = 0.95) -> None:
        self.decay, self.momentum = decay, momentum
        self.stacks: dict[tuple[int, int], list[nn.Parameter]] = {}
        plain: list[nn.Parameter] = []
        still: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                shape = (parameter.shape[0], parameter.shape[1])
                self.stacks.setdefault(shape, []).append(parameter)
            else:
                (plain if parameter.ndim >= 2 else still).append(parameter)
        self.velocity = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self.stacks.items()
        }
        groups = [{"params": plain, "weight_decay": decay}, {"params": still, "weight_decay": 0.0}]
        fused = plain[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), fused=fused)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update, and the gradients cleared."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        for shape, group in self.stacks.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity = self.velocity[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(velocity, self.momentum))
            size = 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-rate * size)
            for parameter in group:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        velocity = {f"{a}x{b}": value for (a, b), value in self.velocity.items()}
        return {"adam": self.adam.state_dict(), "velocity": velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for (a, b), value in self.velocity.items():
            value.copy_(state["velocity"][f"{a}x{b}"])
