"""The predicted class of each row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hf_adafocal.metrics.argmax import FEW_CLASSES, argmax_rows, predicted_classes
from hf_adafocal.metrics.scores import softmax


def rows(samples: int, classes: int, seed: int = 0) -> np.ndarray:
    return softmax(np.random.default_rng(seed).normal(size=(samples, classes)) * 3)


class TestArgmaxRows:
    @given(
        hnp.arrays(
            st.sampled_from([np.float16, np.float32, np.float64]),
            st.tuples(st.integers(1, 9), st.integers(1, FEW_CLASSES + 3)),
            elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        )
    )
    def test_it_is_that_of_numpy_with_the_first_of_a_tie(self, values):
        out = np.full(len(values), -1, dtype=np.intp)
        top = argmax_rows(values, out)
        assert out.tolist() == [max(range(len(row)), key=row.__getitem__) for row in values.tolist()]
        assert top.tolist() == [max(row) for row in values.tolist()]

    @pytest.mark.parametrize("classes", [3, FEW_CLASSES + 1, 300])
    @pytest.mark.parametrize("place", [0, 1, -1])
    def test_the_largest_value_of_a_row_with_nan_is_nan(self, classes, place):
        values = rows(4, classes)
        values[2, place] = np.nan
        assert np.isnan(argmax_rows(values, np.empty(4, dtype=np.intp))).tolist() == [False, False, True, False]

    @pytest.mark.parametrize("order", ["C", "F"])
    def test_the_values_are_left_alone(self, order):
        values = np.asarray(rows(20, 5), order=order)
        before = values.copy()
        argmax_rows(values, np.empty(20, dtype=np.intp))
        assert (values == before).all()


class TestPredictedClasses:
    @pytest.mark.parametrize("classes", [2, FEW_CLASSES, FEW_CLASSES + 1, 40])
    def test_chunks_change_nothing(self, classes):
        values = rows(70_003, classes)
        assert (predicted_classes(values) == values.argmax(axis=1)).all()

    @pytest.mark.parametrize("row", [0, 2500, 5002])
    @pytest.mark.parametrize("factor", [1.4, 0.6])
    def test_a_row_that_is_no_distribution_is_an_error_that_names_it(self, row, factor):
        values = np.full((5003, 4), 0.25)
        values[row] *= factor
        with pytest.raises(ValueError, match=f"row {row} sums to {factor}"):
            predicted_classes(values)
