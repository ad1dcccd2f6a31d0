"""A file format of your own: the folders of a publisher whose models are Llama's under other names."""

from dataclasses import replace

from zili.config.model import ModelConfig
from zili.release.layouts.llama import Llama
from zili.release.layouts.mapping import Rule


class Acme(Llama):
    """Acme's config.json is Llama's. Its tensors are too, but for the name of the output projection."""

    name = "acme"
    model_types = ("acme",)
    architecture = "AcmeForCausalLM"

    def body(self, config: ModelConfig, prefix: str) -> list[Rule]:
        """One rule for each tensor; it is used in both directions."""
        rules = super().body(config, prefix)
        return [replace(rule, published=rule.published.replace("o_proj", "out_proj")) for rule in rules]
