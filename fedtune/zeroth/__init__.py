"""Directions that everybody can draw alone, and a model rebuilt from how far it went along each: the same
bits on every device.

layout   where each parameter stands in the one flat order
philox   the counter-based generator, in numpy
pool     K directions by a key; the oracle of one direction and of their sum
normal   whole numbers with the shape of a normal distribution
kernels  the same, compiled for the CPU by numba
device   the same, in torch integer operations, for parameters that lie elsewhere
tables   Hadamard pools there; triton_tables does that in one kernel on CUDA
curved   steps times a diagonal curvature that the pools before give
apply    walk, replay and project over a model's parameters
"""

from fedtune.zeroth.apply import curvature, project, replay, views, walk, write
from fedtune.zeroth.layout import Layout
from fedtune.zeroth.pool import Pool, combine

__all__ = ["Layout", "Pool", "combine", "curvature", "project", "replay", "views", "walk", "write"]
