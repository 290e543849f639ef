import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedShuffleSplit

from boltlab.data.splits import _shuffled, fold_problems, split_off, take_fold, thin_out
from boltlab.ground.errors import DataError

LABELS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
bounded = settings(deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def labels_of(draw):
    """Labels of up to five classes in any order, some classes perhaps without a sample; or of a regression."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    labels = torch.tensor([label for label, count in enumerate(counts) for _ in range(count)], dtype=torch.long)
    assume(len(labels) >= 2)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw(seeds)))]
    return labels.double() if draw(st.booleans()) else labels


def sizes(labels):
    """Samples of each class; of a regression all of them."""
    return torch.tensor([len(labels)]) if labels.is_floating_point() else torch.bincount(labels, minlength=5)


def test_split_off_is_stratified_exact_and_repeatable():
    rest, chosen = split_off(LABELS, 0.15, seed=0)
    assert torch.bincount(LABELS[chosen]).tolist() in ([9, 5, 1], [9, 4, 2])
    assert sorted([*rest.tolist(), *chosen.tolist()]) == list(range(100))
    assert torch.equal(chosen, split_off(LABELS, 15, seed=0)[1])
    assert not torch.equal(chosen, split_off(LABELS, 15, seed=1)[1])


def test_split_off_keeps_a_sample_of_every_class():
    rest, chosen = split_off(torch.tensor([0] * 20 + [1, 2]), 19, seed=0)
    assert rest.tolist()[-2:] == [20, 21]
    assert len(chosen) == 19


@pytest.mark.parametrize(
    ("counts", "size"),
    [
        ([2, 500, 498], 0.1),
        ([1, 2, 97], 40),
        ([1] * 60 + [2] * 20 + [50, 250], 0.2),
        ([1] * 100 + [101], 0.4),
        ([2] * 50, 50),
        ([3, 0, 2, 45], 0.9),
    ],
)
def test_split_off_has_its_size_where_classes_are_small(counts, size):
    labels = torch.repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    wanted = size if isinstance(size, int) else round(sum(counts) * size)
    rest, chosen = split_off(labels, size, seed=3)
    assert (len(chosen), len(rest)) == (wanted, sum(counts) - wanted)
    left, taken = (torch.bincount(labels[part], minlength=len(counts)) for part in (rest, chosen))
    assert (left + taken).tolist() == counts
    assert torch.equal(left > 0, torch.tensor(counts) > 0)
    share = torch.tensor(counts) * wanted / sum(counts)
    assert torch.all(taken > torch.minimum(share - 1, left + taken - 1.5))  # its share, as far as it has that to spare


@pytest.mark.parametrize(("counts", "size"), [([200, 300], 0.2), ([2, 40, 58], 30), ([33, 33, 34, 7], 0.25)])
def test_split_off_takes_of_each_class_as_many_as_scikit_learn(counts, size):
    labels = torch.repeat_interleave(torch.tensor(counts))
    split = StratifiedShuffleSplit(1, test_size=size, random_state=0).split(labels, labels)
    theirs = torch.bincount(labels[torch.from_numpy(next(split)[1])], minlength=len(counts))
    ours = torch.bincount(labels[split_off(labels, size, seed=0)[1]], minlength=len(counts))
    assert abs(len(labels) * size - ours.sum() if isinstance(size, float) else size - ours.sum()) <= 0.5
    assert torch.all((ours - theirs).abs() <= 1)


def before(labels, size, seed):
    """What was chosen in runs of commit 3135e11: the largest remainders are rounded up, and each class keeps one."""
    count = round(len(labels) * size) if isinstance(size, float) else size
    quota = [n * count / len(labels) for n in torch.bincount(labels).tolist()]
    up = sorted(range(len(quota)), key=lambda label: int(quota[label]) - quota[label])[: count - sum(map(int, quota))]
    left = [min(int(q) + (label in up), int((labels == label).sum()) - 1) for label, q in enumerate(quota)]
    chosen = []
    for index in _shuffled(len(labels), seed).tolist():
        left[labels[index]] -= 1
        chosen += [index] * (left[labels[index]] >= 0)
    return sorted(chosen)


@pytest.mark.parametrize("counts", [[60, 30, 10], [17, 18, 17, 18, 18, 18, 18, 17, 17, 18], [50, 0, 50], [95, 5]])
def test_split_off_is_what_it_was_where_every_class_can_give_its_share(counts):
    """Earlier runs find their validation and test samples again."""
    labels = torch.repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    for size, seed in itertools.product((0.1, 0.25, 33), (0, 1)):
        assert split_off(labels, size, seed)[1].tolist() == before(labels, size, seed)


@pytest.mark.parametrize(
    ("labels", "size", "named"),
    [
        (
            torch.arange(300),
            0.2,
            "60 off 300 samples: each of the 300 .* 300 of them have no other: 0, 1, 2 and 297 more",
        ),
        (torch.tensor([0] * 9 + [1, 2, 3]), 9, "9 off 12 samples: each of the 4 .* 3 of them have no other: 1, 2, 3."),
        (torch.tensor([0, 0, 1, 1]), 3, "3 off 4 samples: each of the 2 classes keeps one to train on. Take"),
    ],
)
def test_split_off_names_the_classes_that_are_too_small(labels, size, named):
    with pytest.raises(DataError, match=f"cannot split {named}"):
        split_off(labels, size, seed=0)
    with pytest.raises(DataError, match=r"data\.task=regression"):
        split_off(labels, size, seed=0)


def test_split_off_of_a_regression_is_random():
    _, chosen = split_off(torch.arange(100).float(), 0.3, seed=0)
    assert len(chosen) == 30
    assert chosen.tolist() != list(range(30))


@pytest.mark.parametrize("size", [0, 100, 200, 0.001, 0.999])
def test_split_off_refuses_an_empty_part(size):
    with pytest.raises(DataError, match="both parts need at least one"):
        split_off(LABELS, size, seed=0)


@bounded
@given(labels=labels_of(), folds=st.integers(2, 12), seed=seeds)
def test_folds_are_disjoint_cover_all_and_differ_by_one_sample(labels, folds, seed):
    present = sizes(labels)[sizes(labels) > 0]
    if present.min() < folds:
        with pytest.raises(DataError, match=f"data.folds={folds}: "):
            take_fold(labels, folds, 0, seed)
        return
    parts = [take_fold(labels, folds, fold, seed) for fold in range(folds)]
    assert sorted(torch.cat([part for _, part in parts]).tolist()) == list(range(len(labels)))
    for rest, part in parts:
        assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(labels)))
        assert torch.equal(part, part.sort().values)
        assert torch.equal(rest, rest.sort().values)
    whole = [len(part) for _, part in parts]
    assert max(whole) - min(whole) <= 1
    by_class = torch.stack([sizes(labels[part]) for _, part in parts])
    assert (by_class.max(0).values - by_class.min(0).values).max() <= 1
    assert torch.equal(take_fold(labels, folds, folds - 1, seed)[1], parts[-1][1])


def test_folds_follow_the_seed_and_their_number():
    one, other = take_fold(LABELS, 5, 0, seed=0)[1], take_fold(LABELS, 5, 0, seed=1)[1]
    assert torch.bincount(LABELS[one]).tolist() == torch.bincount(LABELS[other]).tolist() == [12, 6, 2]
    assert not torch.equal(one, other)
    assert not set(take_fold(LABELS, 10, 0, seed=0)[1].tolist()) <= set(one.tolist())
    assert take_fold(LABELS.float(), 5, 0, seed=0)[1].tolist() != list(range(0, 100, 5))


def test_too_many_folds_name_the_smallest_class():
    labels = torch.tensor([0] * 9 + [1] * 4 + [3] * 3)
    with pytest.raises(DataError, match="data.folds=5: samples of class 3 beside the test set: 3, and each fold needs"):
        take_fold(labels, 5, 0, seed=0)
    with pytest.raises(DataError, match="class 'eel' beside"):
        take_fold(labels, 5, 0, seed=0, class_names=["cat", "dog", "cow", "eel"])
    with pytest.raises(DataError, match="data.folds=17: there are 16 samples beside the test set, too few"):
        take_fold(labels.float(), 17, 0, seed=0)


@bounded
@given(labels=labels_of(), numbers=st.tuples(st.integers(1, 200), st.integers(1, 200)), seed=seeds)
def test_a_thinned_set_is_a_part_of_a_larger_one_and_keeps_every_class(labels, numbers, seed):
    counts = sizes(labels)
    small, large = (min(number, len(labels)) for number in sorted(numbers))
    classes = int((counts > 0).sum())
    if small < classes:
        with pytest.raises(DataError, match=f"data.max_samples={small} is less than one sample of each of"):
            thin_out(labels, small, seed)
        return
    kept = thin_out(labels, small, seed)
    assert len(kept) == small
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert set(kept.tolist()) <= set(thin_out(labels, large, seed).tolist())
    share = counts * small / len(labels)
    assert torch.all(sizes(labels[kept]) < share + 1)
    assert torch.all((sizes(labels[kept]) > 0) == (counts > 0))


def test_a_thinned_set_follows_the_seed():
    assert torch.bincount(LABELS[thin_out(LABELS, 50, seed=0)]).tolist() == [30, 15, 5]
    assert not torch.equal(thin_out(LABELS, 50, seed=0), thin_out(LABELS, 50, seed=1))
    assert thin_out(LABELS.float(), 50, seed=0).tolist() != list(range(50))


@pytest.mark.parametrize(
    ("folds", "fold", "found"),
    [
        (None, None, []),
        (5, 0, []),
        (5, 4, []),
        (None, 0, ["fold"]),
        (5, None, ["folds"]),
        (1, 0, ["folds"]),
        (0, None, ["folds"]),
        (-2, 0, ["folds"]),
        (5, 5, ["fold"]),
        (5, -1, ["fold"]),
    ],
)
def test_numbers_that_do_not_go_together(folds, fold, found):
    assert [name for name, _ in fold_problems(folds, fold)] == found
