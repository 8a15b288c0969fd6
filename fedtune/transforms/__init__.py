"""The message chain: steps between a client's update and the server's sum."""

from fedtune.transforms.base import Chain, Question, Transform
from fedtune.transforms.registry import STEPS, ChainStep, bits_per_parameter, build

__all__ = ["STEPS", "Chain", "ChainStep", "Question", "Transform", "bits_per_parameter", "build"]
