"""The procedural patterns of the pretext task."""

from __future__ import annotations

import numpy as np
import pytest

from hf_histo.data.synthetic.patterns import CLASSES, pattern
from hf_histo.errors import HistoError


def test_every_class_draws_a_full_range_pattern_fixed_by_its_seed() -> None:
    for label in range(CLASSES):
        image = pattern(np.random.default_rng([0, label]), label, size=64)
        assert (image.dtype, image.shape, image.min(), image.max()) == (np.uint8, (64, 64), 0, 255)
        np.testing.assert_array_equal(image, pattern(np.random.default_rng([0, label]), label, size=64))
        assert not np.array_equal(image, pattern(np.random.default_rng([1, label]), label, size=64))


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_an_unknown_class_is_an_error(label: int) -> None:
    with pytest.raises(HistoError, match=f"label={label}: expected 0 to {CLASSES - 1}"):
        pattern(np.random.default_rng(0), label)
