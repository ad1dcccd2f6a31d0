"""The decoder: one class for every model of the family, told apart by its `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zili import ops
from zili.config.mixture import LoraConfig
from zili.config.model import ModelConfig
from zili.models.attention import attention_of
from zili.models.cache import CacheEntry, KeyValueCache
from zili.models.initialization import fill, initial_value
from zili.models.layers import Embedding, Entrance, Linear, RMSNorm, local
from zili.models.mixture import Mixture, Router, feed_forward_of
from zili.models.preference import PreferenceLoss
from zili.models.recomputation import Recompute, recomputed
from zili.models.rotary import Kept, rotary_tables


class Block(nn.Module):
    """One pre-norm layer: `h = x + attention(norm(x))`, `y = h + feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        """`number`: which layer of the model it is, from 0; it says whether there are experts."""
        super().__init__()
        self.dropout = config.hidden_dropout
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = attention_of(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = feed_forward_of(config, number)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        document_ids: Tensor | None = None,
        cache_entry: CacheEntry | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """`x [B, S, D]`, `cos, sin [S, d]`, `document_ids [B, T]`, `padding [B, T]` -> `[B, S, D]`."""
        branch = self._drop(self.attention(self.attention_norm(x), cos, sin, document_ids, cache_entry))
        normed, x = self.feed_forward_norm.after_adding(x, branch)
        return x + self._drop(self.feed_forward(normed, padding))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout) if self.training and self.dropout else branch


class Blocks(nn.Module):
    """Blocks under their number in the whole model, which part of a model keeps: `layers.17` is the 18th everywhere."""

    def __init__(self, config: ModelConfig, numbers: range) -> None:
        super().__init__()
        for number in numbers:
            self.add_module(str(number), Block(config, number))

    def items(self) -> Iterator[tuple[int, nn.Module]]:
        """Number and block, in order."""
        return ((int(name), block) for name, block in self.named_children())

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __getitem__(self, number: int) -> nn.Module:
        return self.get_submodule(str(number))

    def __len__(self) -> int:
        return len(self._modules)


class NextTokens(nn.Module):
    """Multi-token prediction: one more block that predicts the token after the next (DeepSeek-V3, section 2.2).

    It sees the hidden state of a position and the embedding of its next token. Embedding and output matrix are the
    model's own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.projection = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, embedded: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """`hidden, embedded [B, S, D]` -> `[B, S, D]`; `run` calls the block as the model calls its own."""
        joined = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), -1)
        return self.norm(run(self.block, self.projection(joined)))


class Decoder(nn.Module):
    """Token ids to logits, or to a loss.

    Built on the `meta` device it has shapes only; built elsewhere its weights are those of seed 0 until
    `init_weights` or a checkpoint sets others. `recompute` is the trainer's switch: "full" keeps only each
    block's input for the backward pass.

    `part` builds some consecutive layers: the part with the first layer has the embedding and takes ids, every other
    takes the hidden states of the part before it; the part with the last layer has norm and head.
    """

    def __init__(self, config: ModelConfig, part: range | None = None) -> None:
        super().__init__()
        part = range(config.layers) if part is None else part
        first, last = part.start == 0, part.stop == config.layers
        self.config = config
        self.recompute: Recompute = "none"
        self.positions: Callable[[int, torch.device], Tensor] | None = None
        """Which of a row's positions this process has, given the row's length and where; None: all of them."""
        self._frequencies: Kept = {}
        self.vocabulary: ops.VocabularyPart | None = None
        """Which rows of the output matrix this process has; None: all of them."""
        self.first = first
        # A tied output matrix is the embedding, and multi-token prediction embeds, so the last part may have it too.
        embeds = first or (last and bool(config.tied_embeddings or config.mtp_layers))
        self.embedding = Embedding(config.vocab_size, config.hidden_size) if embeds else None
        self.layers = Blocks(config, part)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps) if last else None
        self.gather = Entrance()
        """Before the output matrix, which is cut by rows of the vocabulary and so needs every token."""
        separate = last and not config.tied_embeddings
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False) if separate else None
        self.next_tokens = NextTokens(config) if last and config.mtp_layers else None
        self.readout: Callable[[Tensor], Tensor] | None = None
        """The product with the output matrix, where that lies in another form for it; None: as it is."""
        self.next_loss: Tensor | None = None
        """Losses of multi-token prediction, summed since the trainer last took them, 0-d."""
        self.preference: PreferenceLoss | None = None
        """What becomes of losses where rows are pairs of answers; the trainer's to set."""
        if config.lora is not None:
            self._adapt(config.lora)
        if not next(self.parameters()).is_meta:
            self.init_weights(0)

    def _adapt(self, lora: LoraConfig) -> None:
        """Adapters beside the matrices that have one; nothing else is trained."""
        self.requires_grad_(False)
        for name, module in self.layers.named_modules():
            if isinstance(module, Linear) and name.rpartition(".")[2] in lora.matrices:
                module.adapt(lora.rank, lora.scale)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with its part of `initial_value(name, shape, config, seed)`."""
        for name, parameter in self.named_parameters():
            fill(parameter, initial_value(name, tuple(parameter.shape), self.config, seed))
        for buffer in self.buffers():  # of routers: no bias, and nothing counted yet
            buffer.zero_()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint must hold of the model: parameters, and buffers that training moves."""
        yield from self.named_parameters()
        for name, buffer in self.named_buffers():
            if name.rpartition(".")[2] != "load":
                yield name, buffer

    def routers(self) -> Iterator[tuple[int, Router]]:
        """Routers by their layer's number; that of multi-token prediction comes after the last layer."""
        blocks = [*self.layers.items()]
        if self.next_tokens is not None:
            blocks.append((self.config.layers, self.next_tokens.block))
        for number, block in blocks:
            if isinstance(block.feed_forward, Mixture):
                yield number, block.feed_forward.router

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`: the output matrix, which is the embedding's when tied."""
        assert self.readout is None, "it lies in another form"
        weight = self.head or self.embedding
        assert weight is not None, "only the part with the last layer has it"
        return weight.weight

    def forward(
        self,
        inputs: Tensor,
        *,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KeyValueCache | None = None,
        reference: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Logits `[B, S, V]` in fp32 for ids `inputs [B, S]`; with `labels [B, S]` the sum of their cross entropies.

        Labels are aligned with the inputs: `labels[:, i]` is the token after `inputs[:, i]`, and `IGNORE_INDEX` counts
        nothing. The sum is a 0-d fp32 tensor. A part without the last layer returns hidden states `[B, S, D]`, for
        the next part's `inputs`. Other arguments as for `hidden_states`.

        Labels `[B, S, 2]` hold the token after the next as well. A model that predicts it in training adds that loss
        to what is differentiated; the value returned is that of the next token alone.

        With `reference [B, N]` documents are pairs of answers, and the sum is that of `preference`. `padding` `[B, S]`,
        of whole rows as `document_ids`, is true where nothing is to count in the experts' load.
        """
        x, run = self._blocks(inputs, document_ids, cache, padding)
        if self.norm is None:
            return x
        hidden = self.norm(x[:, -inputs.shape[1] :] if cache is not None else x)
        if labels is None:
            return self.logits(self.gather(hidden))
        if reference is not None:
            return self._preference_sum(hidden, labels, document_ids, reference)
        further = labels[..., 1] if labels.ndim == 3 else None
        labels = labels[..., 0] if labels.ndim == 3 else labels
        loss = self._cross_entropy(hidden, labels)
        if self.next_tokens is None or further is None or not torch.is_grad_enabled():
            return loss
        assert self.embedding is not None
        embedded = self._scaled(self.embedding(labels.clamp(min=0)), self.config.embedding_multiplier)
        next_loss = self._cross_entropy(self.next_tokens(hidden, embedded, run), further)
        self.next_loss = next_loss.detach() + (0.0 if self.next_loss is None else self.next_loss)
        # Differentiated together, reported apart.
        weighted = self.config.mtp_loss_weight * next_loss
        return loss + (weighted - weighted.detach())

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden [..., D]`, as `hidden_states` returns it, to fp32 logits `[..., V]`."""
        product = ops.linear(hidden, local(self.head_weight)) if self.readout is None else self.readout(hidden)
        return self._scaled(product.float(), self.config.logit_multiplier)

    @staticmethod
    def _scaled(x: Tensor, multiplier: float) -> Tensor:
        return x if multiplier == 1.0 else x * multiplier  # most models: no pass over [B, S, V] for nothing

    def hidden_states(
        self, inputs: Tensor, *, document_ids: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """`[B, S, D]` after the final norm, or after the last block of a part.

        Args:
            inputs: ids `[B, S]`; for a part without the first layer, hidden states `[B, S, D]`.
            document_ids: `[B, S]`, or with a cache `[B, T]` for cached and new tokens together; a token sees
                only its own document. None: one document a row. Always of whole rows, also where `inputs` has
                some of a row's positions.
            cache: tokens seen before; the new ones are added to it. Equals the pass without a cache over all
                tokens, whatever the rotary rule; see `KeyValueCache` for the price and for the published
                code's different behaviour.
        """
        x, _ = self._blocks(inputs, document_ids, cache)
        return x if self.norm is None else self.norm(x[:, -inputs.shape[1] :] if cache is not None else x)

    def _blocks(
        self, inputs: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None, padding: Tensor | None = None
    ) -> tuple[Tensor, Callable[[nn.Module, Tensor], Tensor]]:
        """What leaves the last block, and how another block of the same sequence is run."""
        start, inputs = (0, inputs) if cache is None else cache.extend(inputs)
        length = start + inputs.shape[1] if document_ids is None else document_ids.shape[1]
        if self.positions is None:
            positions = torch.arange(start, length, device=inputs.device)
        else:
            positions = self.positions(length, inputs.device)
        rotary, head_dim = self.config.rotary, self.config.rotary_dim
        cos, sin = rotary_tables(rotary, head_dim, positions, length, self._frequencies)
        x = inputs
        if self.first:
            assert self.embedding is not None
            x = self._scaled(self.embedding(inputs), self.config.embedding_multiplier)
            if torch.is_autocast_enabled(x.device.type):
                x = x.float()  # products run in half precision, what they are added up in does not
        for i, block in self.layers.items():
            entry = None if cache is None else cache.entry(i, start)
            x = self._run(block, x, cos, sin, document_ids, entry, padding)
        return x, lambda block, y: self._run(block, y, cos, sin, document_ids, None, padding)

    def _run(self, block: nn.Module, *arguments: Tensor | CacheEntry | None) -> Tensor:
        if self.recompute != "none" and self.training and torch.is_grad_enabled():
            return recomputed(block, self.recompute, *arguments)
        return block(*arguments)

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, reduction: ops.Reduction = "sum") -> Tensor:
        hidden = self.gather(hidden).flatten(0, 1)
        weight, multiplier = local(self.head_weight), self.config.logit_multiplier
        return ops.linear_cross_entropy(hidden, weight, labels.flatten(), multiplier, self.vocabulary, reduction)

    def _preference_sum(self, hidden: Tensor, labels: Tensor, document_ids: Tensor | None, reference: Tensor) -> Tensor:
        assert self.preference is not None and document_ids is not None
        here = document_ids
        if self.positions is not None:
            here = document_ids[:, self.positions(document_ids.shape[1], document_ids.device)]
        losses = self._cross_entropy(hidden, labels, "none").view(labels.shape)
        return self.preference(losses, labels != ops.IGNORE_INDEX, here, document_ids, reference)

    def loss_sum(self, input_ids: Tensor, labels: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
        """Sum of cross entropies over `labels [B, S]` that are not `IGNORE_INDEX`: `forward` with labels."""
        return self(input_ids, labels=labels, document_ids=document_ids)

    def new_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        exact: bool = True,
    ) -> KeyValueCache:
        """An empty cache; dtype and device default to the weights', `exact` is `KeyValueCache`'s."""
        weight = next(self.parameters())
        place = weight.device if device is None else torch.device(device)
        return KeyValueCache(self.config, batch, max_length, dtype=dtype or weight.dtype, device=place, exact=exact)
