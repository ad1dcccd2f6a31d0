"""Pretrain a small model on your own text, and let it write: python examples/pretrain.py TEXT..."""

import sys

import zili

data = zili.prepare(sys.argv[1:], "runs/pretrained/data")
model = {"preset": "telechat2-3b", "scaled_to": 128}  # a small twin of a published shape
training = {"steps": 200, "sequence_length": 128, "global_batch": 8}
zili.train({"folder": "runs/pretrained", "model": model, "data": data.table, "training": training})
print(zili.generate("runs/pretrained", "Once upon a time", max_new_tokens=50))
