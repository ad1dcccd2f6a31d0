"""Learning from a teacher: what a larger model gives every token, beside the token that came."""

from __future__ import annotations

from zili.config.model import ModelConfig
from zili.data.loader import Batch
from zili.models.layers import local
from zili.models.outputs import Outputs
from zili.objectives.objective import Objective, Peers, Terms, targets
from zili.ops.distillation import Head, linear_distillation


class Distillation(Objective):
    """`(1 - weight) cross entropy + weight divergence` of the next token (Hinton et al. 2015, section 2)."""

    figures = ("cross_entropy", "divergence")
    """Both parts of the loss, unweighted: nats a token, the divergence times the temperature squared."""

    def __init__(self, teacher: ModelConfig, weight: float, temperature: float) -> None:
        self.teacher = teacher
        self.weight, self.temperature = weight, temperature

    def terms(self, outputs: Outputs, batch: Batch, peers: Peers) -> Terms:
        assert outputs.teacher is not None
        loss, entropy, divergence = linear_distillation(
            _head(outputs),
            _head(outputs.teacher),
            batch.labels.flatten(),
            self.weight,
            self.temperature,
            outputs.vocabulary,
        )
        return Terms(loss, {"cross_entropy": entropy, "divergence": divergence}, targets(batch.labels))


def _head(outputs: Outputs) -> Head:
    decoder = outputs.decoder
    hidden = decoder.gather(outputs.hidden).flatten(0, 1)
    return Head(hidden, local(decoder.head_weight), decoder.config.logit_multiplier)
