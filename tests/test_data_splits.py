"""Few-shot draws equal Dassl's, and the base/new cut equals CoOp's."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvg_adapter.data import DataError, base_new_split, few_shot_indices, select_classes


def dassl_draw(labels, shots):
    """What Dassl's generate_fewshot_dataset does with the global generator, on (label, index) pairs."""
    tracker = defaultdict(list)
    for index, label in enumerate(labels):
        tracker[label].append((label, index))
    drawn = []
    for items in tracker.values():
        drawn.extend(random.sample(items, shots) if len(items) >= shots else items)
    return [index for _, index in drawn]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)), st.integers(1, 9), st.integers(0, 2**31))
def test_draw_equals_dassl(train, val, shots, seed):
    random.seed(seed)
    expected = dassl_draw(train, shots), dassl_draw(val, min(shots, 4))
    assert few_shot_indices(train, shots, seed=seed, val_labels=val) == expected


def test_draw_is_the_same_on_every_machine():
    labels, val = [2] * 6 + [0] * 3 + [1] * 5, [0, 1, 2] * 5
    expected = [1, 4, 0, 7, 6, 8, 12, 13, 11], [9, 3, 0, 10, 1, 4, 11, 2, 8]
    assert few_shot_indices(labels, 3, seed=1, val_labels=val) == expected
    assert few_shot_indices(labels, 3, seed=1) == (expected[0], [])
    assert few_shot_indices(labels, 3, seed=2) != (expected[0], [])


def test_draw_leaves_the_global_generator_alone():
    state = random.getstate()
    few_shot_indices([0, 0, 1], 1, seed=5)
    assert random.getstate() == state


def test_draw_comes_before_the_cut():
    """New classes that come first in the stream move the draw of the base ones: the order of the two steps matters."""
    labels = [1] * 20 + [0] * 20
    whole = [i for i in few_shot_indices(labels, 4, seed=1)[0] if labels[i] == 0]
    base_only = [20 + i for i in few_shot_indices([0] * 20, 4, seed=1)[0]]
    assert whole != base_only


@pytest.mark.parametrize("shots", [0, -1])
def test_no_shots_is_an_error(shots):
    with pytest.raises(DataError, match="at least 1"):
        few_shot_indices([0, 1], shots, seed=1)


@pytest.mark.parametrize(
    ("count", "base", "new"), [(1, [0], []), (2, [0], [1]), (5, [0, 1, 2], [3, 4]), (6, [0, 1, 2], [3, 4, 5])]
)
def test_base_new(count, base, new):
    assert base_new_split([f"class {9 - i}" for i in range(count)]) == (base, new)


@pytest.mark.parametrize("classes", [[], "cat"])
def test_base_new_bad_input(classes):
    with pytest.raises(DataError, match="list with at least one class name"):
        base_new_split(classes)


def test_select_classes():
    assert select_classes([4, 2, 0, 2, 4], [2, 4]) == ([0, 1, 3, 4], [1, 0, 0, 1])
    assert select_classes([0, 1], []) == ([], [])
    with pytest.raises(DataError, match="'3'"):
        select_classes([1, 3], [3, 1, 3])
