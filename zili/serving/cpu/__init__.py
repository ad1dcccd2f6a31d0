"""What a CPU reads and runs in a step of generation: packed weights, compiled kernels."""
