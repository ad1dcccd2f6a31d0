"""The decoder and its arithmetic.

Nothing is imported here on purpose: `zili.models.arithmetic` serves planning, which runs without torch.
"""
