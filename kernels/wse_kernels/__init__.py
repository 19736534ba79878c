"""Mathematics of one core on plain blocks: the lowest room of wse-emu. Imports NumPy and Numba only.

Importing this package imports neither: each module is imported when it is needed.
"""
