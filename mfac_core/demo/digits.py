"""The data of the demo: scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["DigitImages"]


class DigitImages(NamedTuple):
    """1,797 images of 8 x 8 pixels, float32 in ``[0, 1]``, and their digits; three tenths of them for testing."""

    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]

    @classmethod
    def load(cls, seed: int, *, channel_axis: int) -> DigitImages:
        """Return the digits, split by a seed with equal shares of each digit; images have a channel axis of size 1."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images = np.expand_dims((pixels / 16).astype(np.float32).reshape(-1, 8, 8), channel_axis)
        train_images, test_images, train_labels, test_labels = train_test_split(
            images, labels, test_size=0.3, random_state=seed, stratify=labels
        )
        return cls(train_images, train_labels, test_images, test_labels)
