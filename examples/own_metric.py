"""A metric of your own: how many tokens the model is sure of, beside the loss of the next token."""

from math import log

import zili


class SureTokens(zili.Objective):
    """The next token. `sure` is the share of targets to which the model gives a probability above one half."""

    figures = ("sure",)

    def terms(self, outputs: zili.Outputs, batch: zili.Batch, peers: zili.Peers) -> zili.Terms:
        losses = outputs.cross_entropy(batch.labels, reduction="none")  # [B, S], nats
        counted = batch.labels != zili.IGNORE_INDEX
        sure = ((losses < log(2)) & counted).sum().float()
        return zili.Terms(losses.sum(), {"sure": sure}, counted.sum().float())
