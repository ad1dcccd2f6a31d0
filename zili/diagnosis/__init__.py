"""What a chip can do, whether its numbers are right, and where they first go wrong: `zili doctor`, `zili align`."""
