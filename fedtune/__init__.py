"""fedtune: federated fine-tuning of one pretrained model, on Flower.

Importing this package loads neither torch nor Flower; see DESIGN in docs/architecture.md for the floors.
"""

__version__ = "0.1.0"
