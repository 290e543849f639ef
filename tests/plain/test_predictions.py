"""Predictions that are no table keep the samples of each batch apart."""

import pytest
import torch

from boltlab.commands.predict_loader import joined


def boxes(count):
    return {"boxes": torch.arange(4.0 * count).view(count, 4), "labels": torch.arange(count)}


def rows(first, last):
    return torch.arange(2 * first, 2 * last).view(-1, 2)


LISTS = {
    "dicts, as a detector gives them": [[boxes(1), boxes(3)], [boxes(2), boxes(0)]],
    "dicts, and a last batch that is smaller": [[boxes(1), boxes(3)], [boxes(2)]],
    "texts": [["a", "b"], ["c", "d"]],
    "tensors of several lengths": [[torch.ones(3), torch.ones(1)], [torch.ones(2), torch.ones(5)]],
    "one sample a batch": [[boxes(2)], [boxes(1)]],
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_samples_stays_one(kind):
    batches = LISTS[kind]
    found = joined(batches, [len(batch) for batch in batches])
    expected = [sample for batch in batches for sample in batch]
    assert len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))


def test_a_list_of_parts_is_joined_by_part():
    found = joined([[rows(0, 2), rows(5, 7)], [rows(2, 4), rows(7, 9)]], [2, 2])
    assert torch.equal(found[0], rows(0, 4)) and torch.equal(found[1], rows(5, 9))
