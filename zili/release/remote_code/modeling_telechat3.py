# Copyright the Zili authors. Apache License 2.0.
"""TeleChat3 for transformers (`trust_remote_code`): Llama's tensors and maths under a name of its own."""

from transformers import LlamaForCausalLM

from .configuration_telechat3 import TeleChat3Config


class TeleChat3ForCausalLM(LlamaForCausalLM):
    config_class = TeleChat3Config
