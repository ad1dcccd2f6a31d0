"""What a step of Zili's own takes, exactly: weights, work, messages, memory, order."""
