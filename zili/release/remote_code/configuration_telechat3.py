# Copyright the Zili authors. Apache License 2.0.
"""Configuration of TeleChat3 models, for transformers and vLLM (`trust_remote_code`)."""

import math

from transformers import LlamaConfig


class TeleChat3Config(LlamaConfig):
    """Llama's, but for `rope_type` "telechat3-yarn": YaRN that multiplies cos and sin by 0.07 ln(factor) + 1."""

    model_type = "telechat3"

    def __init__(self, rope_scaling=None, **kwargs):
        # transformers validates rope types by name, so the one it has not is said as the one it has.
        super().__init__(rope_scaling=_as_yarn(rope_scaling), **_renamed(kwargs))


def _renamed(kwargs):
    table = kwargs.get("rope_parameters")
    return {**kwargs, "rope_parameters": _as_yarn(table)} if table else kwargs


def _as_yarn(table):
    if not table or table.get("rope_type", table.get("type")) != "telechat3-yarn":
        return table
    factor = 0.07 * math.log(max(table["factor"], 1.0)) + 1.0
    return {**table, "rope_type": "yarn", "attention_factor": table.get("attention_factor") or factor}
