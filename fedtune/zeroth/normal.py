"""Whole numbers with the shape of a normal distribution: 256 quantiles, drawn by a byte.

TABLE[b] is 512 times the normal quantile at (b + 1/2) / 256, rounded. It is symmetric, so the mean is exactly 0; its mean square is
66766932 / 256 exactly, and UNIT is one over the root of that, so that UNIT * TABLE has variance 1. Its kurtosis is 2.9175 (normal: 3) and its
largest value 2.89 standard deviations: the tails are cut, everything else of the shape is there.
"""

from __future__ import annotations

import numpy as np

# Written out rather than computed: a quantile function whose last bit differs between platforms must not decide which whole number is nearest.
POSITIVE = (
    3, 8, 13, 18, 23, 28, 33, 38, 43, 48, 53, 58, 63, 68, 73, 78, 83, 88, 93, 98, 103, 109, 114, 119, 124, 129, 134, 140, 145, 150, 155, 161,
    166, 171, 176, 182, 187, 192, 198, 203, 209, 214, 220, 225, 231, 236, 242, 247, 253, 259, 264, 270, 276, 282, 288, 294, 299, 305, 311, 318,
    324, 330, 336, 342, 348, 355, 361, 368, 374, 381, 387, 394, 401, 408, 415, 422, 429, 436, 443, 451, 458, 465, 473, 481, 489, 497, 505, 513,
    521, 530, 538, 547, 556, 565, 575, 584, 594, 604, 614, 624, 635, 646, 657, 669, 681, 693, 706, 719, 733, 747, 762, 777, 794, 811, 829, 848,
    868, 890, 914, 940, 968, 1000, 1036, 1079, 1130, 1196, 1290, 1477,
)  # fmt: skip
TABLE = np.array([-value for value in reversed(POSITIVE)] + list(POSITIVE), np.int16)
TABLE.flags.writeable = False
UNIT = (256 / 66766932) ** 0.5
