"""An objective of your own: the next token, and a z-loss that keeps logits small (PaLM, section 5).

    python examples/own_objective.py RECIPE

A package of yours that has it under the entry point `zili.objectives` lets any recipe name it, `[objective.z_loss]`:

    [project.entry-points."zili.objectives"]
    z_loss = "own_objective:ZLoss"
"""

import sys

import zili


class ZLoss(zili.Objective):
    figures = ("z_loss",)  # reported beside the loss, as a mean over targets

    def __init__(self, weight: float = 1e-4) -> None:
        self.weight = weight

    def terms(self, outputs: zili.Outputs, batch: zili.Batch, peers: zili.Peers) -> zili.Terms:
        counted = batch.labels != zili.IGNORE_INDEX
        z_loss = (outputs.logsumexp(outputs.logits()).square() * counted).sum()
        loss = outputs.cross_entropy(batch.labels) + self.weight * z_loss
        return zili.Terms(loss, {"z_loss": z_loss.detach()}, counted.sum())


if __name__ == "__main__":
    zili.train(sys.argv[1], objective=ZLoss())
