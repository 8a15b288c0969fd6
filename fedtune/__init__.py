"""fedtune: federated fine-tuning of one pretrained model, on Flower.

Importing this package loads neither torch nor Flower; see DESIGN in docs/architecture.md for the floors.
"""

from fedtune.threads import shorten_spinning

__version__ = "0.1.0"

shorten_spinning()  # here, since torch reads the setting when it is imported, and everything of fedtune comes before that
