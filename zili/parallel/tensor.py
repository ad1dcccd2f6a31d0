"""Tensor parallelism with sequence parallelism: how each matrix is cut, and where tokens cross processes.

Matrices that widen are cut by output rows, those that narrow by input columns, so one pair of collectives serves two
products (Shoeybi et al. 2019); between the pairs each process has some tokens of every sequence, not all of them
(Korthikanti et al. 2022). Embedding and output matrix are cut by rows of the vocabulary.

Weights become DTensors, which say what part of which whole a process holds. Arithmetic stays on plain tensors
(`zili.models.layers.local`), so every faster operation serves here too.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from zili.models.decoder import Decoder
from zili.models.layers import Seam, lowered
from zili.models.mixture import Experts
from zili.parallel.collectives import AllSum, Communicator, gather, scatter_sum
from zili.parallel.cuts import cut_of
from zili.parallel.world import World
from zili.torch_private import functional_collectives as funcol

_SEQUENCE = 1
"""Dimension of the tokens in `[B, S, D]`."""


class GatherTokens(Seam):
    """Some tokens of each sequence in, all of them out."""

    def __init__(self, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S / t, D]` -> `[B, S, D]`."""
        return gather(lowered(x), _SEQUENCE, self.communicator)


class ScatterSum(Seam):
    """Terms of every token in, the sum of some tokens out."""

    def __init__(self, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, D]` -> `[B, S / t, D]`."""
        return scatter_sum(x, _SEQUENCE, self.communicator)


SEAMS: dict[str, type[GatherTokens | ScatterSum]] = {
    "*.attention.enter": GatherTokens,
    "*.attention.output.leave": ScatterSum,
    "*.feed_forward.enter": GatherTokens,
    "*.feed_forward.down.leave": ScatterSum,
    "embedding.leave": ScatterSum,
    ".gather": GatherTokens,
}
SEAM_NAMES = ("enter", "leave", "gather")


class VocabularyRows:
    """`ops.VocabularyPart` over a process group."""

    def __init__(self, first: int, group: dist.ProcessGroup) -> None:
        self.first = first
        self._group = group

    def sum(self, x: Tensor) -> Tensor:
        return AllSum.apply(x, self._group)

    def max(self, x: Tensor) -> Tensor:
        return funcol.wait_tensor(funcol.all_reduce(x, "max", self._group))


def apply_tensor_parallel(model: Decoder, world: World) -> None:
    """Cut `model`, still on the meta device, over the processes that share matrices."""
    mesh, communicator = world.mesh("tensor"), world.communicator("tensor")
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            continue  # they are whole here: `expert` parallelism shares them, among these processes too
        for key, parameter in list(module.named_parameters(recurse=False)):
            dimension = cut_of(name, key)
            placement: Placement = Replicate() if dimension is None else Shard(dimension)
            cut = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(cut, requires_grad=parameter.requires_grad))
        for key in SEAM_NAMES:
            kind = next((kind for pattern, kind in SEAMS.items() if fnmatchcase(f"{name}.{key}", pattern)), None)
            if kind is not None and hasattr(module, key):
                setattr(module, key, kind(communicator))
    first = mesh.get_local_rank() * (model.config.vocab_size // mesh.size())
    if model.embedding is not None:
        model.embedding.first_row = first
    if model.norm is not None:
        model.tokens = lambda rows: rows.chunk(mesh.size(), _SEQUENCE)[mesh.get_local_rank()]
        model.vocabulary = VocabularyRows(first, communicator.group)
