"""A mixture of experts: a router, experts as stacks of matrices, and what keeps their load even.

Everything that is counted or averaged is taken a sequence, or the whole step, at a time, never a micro-batch. So a
token's route and a step's losses do not depend on how the batch was cut.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zili import ops
from zili.config.mixture import MixtureConfig
from zili.config.model import ModelConfig
from zili.models.feed_forward import FeedForward
from zili.models.layers import Seam, local, lowered
from zili.models.outputs import RouterFigures, Routing


class Routes(NamedTuple):
    """Where tokens go, padding too."""

    experts: Tensor
    """`[B, S, k]` int64."""
    weights: Tensor
    """`[B, S, k]` fp32: what each expert's output counts."""
    counts: Tensor
    """`[E]` int64: how many go to each expert."""


class Router(nn.Module):
    """Scores of every expert for every token, and the `top_k` that are chosen. In fp32 throughout.

    Sources: softmax, TeleChat2-39B-A12B's (MindFormers TopkRouterV2); sigmoid with a bias that only chooses,
    DeepSeek-V3 section 2.1.2, which TeleChat3-105B-A4.7B follows.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.mixture is not None
        self.layer = layer
        self.mixture: MixtureConfig = config.mixture
        experts = self.mixture.experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(experts) if self.mixture.bias else None)
        self.sequence = Seam()
        """Sums what the processes that share a sequence counted."""
        self.positions = Seam()
        """Takes the positions of whole rows `[B, S]` whose tokens are here."""

    def forward(self, x: Tensor, routing: Routing) -> tuple[Routes, Tensor]:
        """`x [B, S, D]` -> routes, and the balance loss summed over tokens (0-d). Notes its figures in `routing`.

        What is padding is routed and counts neither in the loss nor among the tokens. Every
        token of a document counts, learned or not: questions go through the experts as answers do (as with the masks
        of transformers' load_balancing_loss_func and of Megatron-LM's MoELayer).
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), local(self.weight).float())
        softmax = self.mixture.scoring == "softmax"
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        wanted = scores if self.expert_bias is None else scores + self.expert_bias
        experts = wanted.topk(self.mixture.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.mixture.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        chosen = F.one_hot(experts, self.mixture.experts).sum(2)
        routes = Routes(experts, weights * self.mixture.scale, chosen.sum((0, 1)))
        shares = scores / scores.sum(-1, keepdim=True)
        length = None
        if routing.padding is not None:
            length, filled = routing.padding.shape[1], ~self.positions(routing.padding)[..., None]
            chosen, shares = chosen * filled, shares * filled
        counts = chosen.sum(1).float()
        loss = self._balance_loss(shares.sum(1), counts, length, routing.weight)
        if torch.is_grad_enabled():
            routing.figures.append(RouterFigures(self.layer, counts.sum(0), loss.detach()))
        return routes, loss

    def _balance_loss(self, shares: Tensor, counts: Tensor, length: int | None, weight: float) -> Tensor:
        """`E / (k T) counts . mean(share)` of each sequence of T tokens, times its positions, summed (DeepSeek-V3, eq.
        17 to 20).

        `shares, counts [B, E]`, sums over the tokens here. Of a sequence that processes share each adds its term.
        `length`: positions, where some are padding; a row weighs the same however full it is. `weight`: `Routing`'s.
        """
        if not self.mixture.balance_loss or not torch.is_grad_enabled():
            return shares.new_zeros(())
        counts = self.sequence(counts)
        tokens = counts.sum(-1, keepdim=True).clamp(min=1) / self.mixture.top_k
        fractions = self.mixture.experts / self.mixture.top_k * counts / tokens
        fill = 1.0 if length is None else length / tokens
        return weight * self.mixture.balance_loss * (fractions * shares * fill).sum()

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the biases after a step in which `load [E]` tokens went to each expert, over all processes."""
        if self.expert_bias is not None and self.mixture.bias_update_rate:
            self.expert_bias += self.mixture.bias_update_rate * torch.sign(load.mean() - load)


class WithLoss(torch.autograd.Function):
    """Passes `x` on; backward, `loss` (0-d) joins the sum that is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), device=grad.device)


class Exchange(nn.Module):
    """Brings rows to the processes that have their experts, and back. Alone, a process has all experts."""

    def there(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """`rows [M, D]` sorted by expert, `counts [E]` -> those of the experts here, and what `back` needs."""
        return rows, counts, None

    def back(self, rows: Tensor, ticket: Any) -> Tensor:
        """Rows in the order in which they were given to `there`."""
        return rows


class Experts(nn.Module):
    """E SwiGLU layers as three stacks of matrices: gate, up `[E, F, D]`, down `[E, D, F]`."""

    def __init__(self, mixture: MixtureConfig, hidden: int) -> None:
        super().__init__()
        experts, ffn = mixture.experts, mixture.ffn_hidden_size
        self.gate = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.exchange = Exchange()

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`rows [M, D]` sorted by expert, of which `counts [E]` (int64) say how many are whose -> `[M, D]`."""
        rows, counts, ticket = self.exchange.there(rows, counts)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = (ops.grouped_matmul(rows, local(weight), ends) for weight in (self.gate, self.up))
        return self.exchange.back(ops.grouped_matmul(ops.swiglu(gate, up), local(self.down), ends), ticket)


class MixtureOfExperts(nn.Module):
    """`x [B, S, D]` -> `[B, S, D]`: the chosen experts' outputs, weighted, and the shared expert's."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.mixture is not None
        mixture = config.mixture
        self.router = Router(config, layer)
        self.experts = Experts(mixture, config.hidden_size)
        self.shared: FeedForward | None = None
        if mixture.shared_experts:
            width = mixture.shared_experts * mixture.ffn_hidden_size
            self.shared = FeedForward(config.changed(ffn_hidden_size=width))

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        routes, loss = self.router(x, routing or Routing())
        if loss.requires_grad:
            x = WithLoss.apply(x, loss)
        out = self._routed(x, routes)
        return out if self.shared is None else out + self.shared(x)

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        rows, places = ops.permute(lowered(x).flatten(0, 1), routes.experts.flatten(0, 1))
        out = ops.unpermute(self.experts(rows, routes.counts), places, routes.weights.flatten(0, 1))
        return out.to(x.dtype).view(x.shape)


def feed_forward_of(config: ModelConfig, layer: int) -> nn.Module:
    """What layer `layer` has between its second norm and the residual."""
    return MixtureOfExperts(config, layer) if config.has_experts(layer) else FeedForward(config)
