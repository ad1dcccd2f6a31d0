"""Go on training a model on another kind of text, and say what it gained: python examples/finetune.py MODEL TEXT..."""

import sys
from pathlib import Path

import zili
from zili.serving.model_folder import find_tokenizer

model, *text = sys.argv[1:]
tokenizer, _ = find_tokenizer(Path(model))
data = zili.prepare(text, "runs/finetuned/data", tokenizer=tokenizer)
recipe = {
    "folder": "runs/finetuned",
    "model": {"folder": model},  # its shape, and the weights that the run begins with
    "data": data.table,
    "training": {"steps": 100, "sequence_length": 64, "global_batch": 8},
    "optimizer": {"learning_rate": 1e-4},
}
zili.train(recipe)
before, after = (zili.evaluate(one, [data.held_out_text]).bits_per_byte for one in (model, "runs/finetuned"))
print(f"bits per byte of text that neither has read: {before:.3f} before, {after:.3f} after")
