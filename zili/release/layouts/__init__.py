"""Published layouts: how each names, cuts and orders what Zili's model holds."""
