"""For any sizes, stops and workers: an epoch is seen once, in the order that it has without the stops."""

import copy
from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from boltlab.data.augment import Augment
from boltlab.data.images import ImageBatches
from boltlab.data.loader import Batches, Loader, TensorData
from boltlab.data.samplers import EvalSampler, TrainSampler
from boltlab.ground.errors import DataError

pytestmark = pytest.mark.floats

bounded = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)


class Pixels:
    """What files give: made sample by sample, in threads or in this one."""

    def __init__(self, x):
        self.x, self.labels = x, torch.arange(len(x))

    def __len__(self):
        return len(self.x)

    def pixels(self, index):
        return self.x[index].permute(1, 2, 0).numpy()


class Numbers:
    """A data set of somebody's own that draws: worker processes make it."""

    def __init__(self, size):
        self.size, self.labels = size, torch.arange(size)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.rand(2), index


def source(kind, size):
    x = (torch.arange(size * 12) % 251).to(torch.uint8).reshape(size, 3, 2, 2)
    return {"memory": lambda: TensorData(x, torch.arange(size)), "files": lambda: Pixels(x)}[kind]()


def loader(kind, sampler, workers):
    augment = Augment(input_shape=(3, 2, 2), flip_probability=0.5)
    return Loader(ImageBatches(source(kind, sampler.size), 3, (3, 2, 2), augment=augment), sampler, 0, workers)


@st.composite
def plans(draw):
    """(arguments of a TrainSampler without its rank, the number of ranks, epoch)"""
    ranks = draw(st.integers(1, 4))
    size = draw(st.integers(ranks, 120))
    arguments = {
        "size": size,
        "batch_size": draw(st.integers(1, 20)),
        "seed": draw(seeds),
        "world_size": ranks,
        "shuffle": draw(st.booleans()),
    }
    return arguments, ranks, draw(st.integers(0, 1000))


def make(kind, plan, rank, workers, **other):
    arguments, _, epoch = plan
    fresh = loader(kind, TrainSampler(**{**arguments, "rank": rank, **other}), workers)
    fresh.sampler.set_epoch(epoch)
    return fresh


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True)
    )


@bounded
@given(
    plan=plans(),
    kind=st.sampled_from(["memory", "memory", "files"]),
    workers=st.tuples(*[st.sampled_from([0, 0, 1, 3])] * 3),
    stops=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_an_epoch_with_two_stops_is_the_epoch(plan, kind, workers, stops):
    _, ranks, epoch = plan
    for rank in range(ranks):
        whole = list(make("memory", plan, rank, 0))
        first, second, third = (make(kind, plan, rank, count) for count in workers)
        # A stop before the first batch, in the middle or after the last; two processes may stop at other places.
        parts = list(islice(first, stops[0]))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        more = list(islice(second, stops[1]))
        third.load_state_dict(second.state_dict())
        rest = list(third)
        assert same([*parts, *more, *rest], whole)
        assert third.state_dict()["delivered"] == len(whole) == len(third)
        named = [third.sampler.batch_indices(epoch, batch) for batch in range(third.sampler.batches)]
        assert torch.equal(torch.cat(named), torch.cat([y for _, y in whole]))


@bounded
@given(plan=plans(), other=st.sampled_from([1, 2, 3, 4, 6, 12]), balanced=st.booleans())
def test_the_batches_are_the_same_for_any_number_of_processes(plan, other, balanced):
    arguments, _, epoch = plan
    together, size = 12 * arguments["batch_size"], max(other, arguments["size"])
    arguments |= {"size": size, "labels": torch.arange(size) % 3 if balanced else None}

    def epoch_of(ranks):
        samplers = [
            TrainSampler(**{**arguments, "batch_size": together // ranks, "world_size": ranks, "rank": rank})
            for rank in range(ranks)
        ]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return samplers

    (one,), several = epoch_of(1), epoch_of(other)
    assert {(len(sampler), sampler.batches) for sampler in several} == {(len(one), one.batches)}
    seen = 0
    for batch in range(one.batches):
        expected = one.batch_indices(epoch, batch)
        seen += len(expected)
        for rank, sampler in enumerate(several):
            own, total = sampler.samples_in(batch)
            indices = sampler.batch_indices(epoch, batch)
            assert total == len(expected) == sum(each.samples_in(batch)[0] for each in several)
            assert torch.equal(indices[:own], expected[rank::other])
            # What is repeated is of the same batch, and just enough for a norm.
            assert set(indices.tolist()) <= set(expected.tolist())
            assert len(indices) == max(own, min(2, sampler.batch_size, total))
    assert seen == size - (size > together and size % together == 1)


@settings(bounded, max_examples=40)
@given(plan=plans(), delivered=st.integers(0, 30), other=st.integers(1, 20))
def test_another_batch_size_goes_on_only_at_an_epochs_end(plan, delivered, other):
    assume(other != plan[0]["batch_size"])
    first, second = make("memory", plan, 0, 0), make("memory", plan, 0, 0, batch_size=other)
    list(islice(first, delivered))
    second.load_state_dict(first.state_dict())
    if first.state_dict()["delivered"] < len(second):
        with pytest.raises(DataError, match="the same data.batch_size"):
            list(second)
    else:
        assert list(second) == []


@settings(bounded, max_examples=40)
@given(plan=plans(), delivered=st.integers(0, 30), workers=st.sampled_from([0, 2]))
def test_the_next_epoch_begins_at_its_beginning(plan, delivered, workers):
    arguments, _, epoch = plan
    first, second = make("files", plan, 0, workers), make("memory", plan, 0, 0)
    list(islice(first, delivered))
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(epoch + 1)
    assert same(list(second), list(make("memory", (arguments, 1, epoch + 1), 0, 0)))
    assert second.state_dict()["epoch"] == epoch + 1


@bounded
@given(
    ranks=st.integers(1, 5),
    size=st.integers(1, 120),
    batch_size=st.integers(1, 20),
    kind=st.sampled_from(["memory", "files"]),
    workers=st.sampled_from([0, 0, 2]),
)
def test_evaluation_sees_every_sample_once(ranks, size, batch_size, kind, workers):
    assume(size >= ranks)
    loaders = [loader(kind, EvalSampler(size, batch_size, rank, ranks), workers) for rank in range(ranks)]
    batches = [list(each) for each in loaders]
    assert sorted(torch.cat([y for each in batches for _, y in each]).tolist()) == list(range(size))
    assert {len(each) for each in batches} == {len(loaders[0])}  # FSDP waits for the others at each batch
    assert all(0 < len(y) <= batch_size + 1 for each in batches for _, y in each)


@settings(bounded, max_examples=3)  # processes start in seconds
@given(plan=plans(), delivered=st.integers(0, 30))
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_worker_processes_change_nothing(plan, delivered):
    def own(workers):
        sampler = TrainSampler(**plan[0])
        sampler.set_epoch(plan[2])
        return Loader(Batches(Numbers(sampler.size), seed=1), sampler, 0, workers)

    whole, first, second = list(own(0)), own(2), own(1)
    parts = list(islice(first, delivered))
    second.load_state_dict(first.state_dict())
    assert same([*parts, *second], whole)
