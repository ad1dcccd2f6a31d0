"""A metric of your own: how many tokens the model is sure of, beside the loss of the next token."""

from math import log

from zili.data.loader import Batch
from zili.models.outputs import Outputs
from zili.objectives import Objective, Peers, Terms
from zili.ops import IGNORE_INDEX


class SureTokens(Objective):
    """The next token. `sure` is the share of targets to which the model gives a probability above one half."""

    figures = ("sure",)

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        losses = outputs.cross_entropy(batch.labels, reduction="none")  # [B, S], nats
        counted = batch.labels != IGNORE_INDEX
        sure = ((losses < log(2)) & counted).sum().float()
        return Terms(losses.sum(), {"sure": sure}, counted.sum().float())
