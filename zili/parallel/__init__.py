"""One model over many processes: the mesh, a file for each dimension, and one function that applies them in order.

`layout` is arithmetic alone and imports no torch; everything else is imported by name where it is needed.
"""
