import pytest
import torch

from boltlab.data.samplers import Draws, EvalSampler, TrainSampler, own_random_state, random_key
from boltlab.ground.errors import DataError

pytestmark = pytest.mark.floats


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert all(number == epoch for number, _ in batches)
    return torch.cat([indices for _, indices in batches]).tolist()


def test_random_key_is_splitmix64():
    assert random_key(0) == 0xE220A8397B1DCDAF  # first output of the reference implementation seeded with 0
    keys = {random_key(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(100)}
    assert len({key & 0xFFFFFFFF for key in keys}) == 900  # torch's generator uses the lower half alone


def test_draws_are_random_key_to_the_bit():
    indices = torch.tensor([0, 1, 7, 2**40])
    draws = Draws(3, 2**33, indices).uniforms(5, 3)
    expected = [[(random_key(3, 2**33, i, j) >> 40) / 2**24 for j in (5, 6, 7)] for i in indices.tolist()]
    assert draws.tolist() == expected
    assert Draws(3, 2**33, indices[2:3]).uniform(6).tolist() == [expected[2][1]]


def test_draws_are_uniform_and_independent():
    numbers = Draws(0, 0, torch.arange(20_000)).uniforms(0, 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    torch.testing.assert_close(numbers.mean(0), torch.full((4,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.corrcoef(numbers.T), torch.eye(4), atol=0.03, rtol=0)
    neighbours = torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))[0, 1]
    assert abs(neighbours) < 0.03


def test_own_random_state_is_put_back_after_an_error():
    before = torch.get_rng_state()

    def fail_after_drawing():
        with own_random_state() as seed:
            seed(1)
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_drawing()
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_is_a_permutation_of_seed_and_epoch():
    first = epoch_of(TrainSampler(100, 8, seed=0))
    assert sorted(first) == list(range(100))
    assert first != sorted(first)
    assert first == epoch_of(TrainSampler(100, 16, seed=0))
    assert first != epoch_of(TrainSampler(100, 8, seed=0), epoch=1)
    assert first != epoch_of(TrainSampler(100, 8, seed=1))
    assert epoch_of(TrainSampler(100, 8, seed=0, shuffle=False)) == list(range(100))


def test_the_start_leaves_out_what_was_trained():
    sampler = TrainSampler(20, 8, seed=0)
    whole = epoch_of(sampler)
    for start in range(4):
        sampler.start = start
        assert [i for _, indices in sampler for i in indices.tolist()] == whole[8 * start :]


def test_a_rank_without_samples_of_the_last_batch_repeats_others_of_it():
    ranks = [TrainSampler(26, 4, 0, rank, 3) for rank in range(3)]  # 26 = 2 x 12 + 2
    *_, last = TrainSampler(26, 12, 0)
    assert [sampler.samples_in(2) for sampler in ranks] == [(1, 2), (1, 2), (0, 2)]
    assert [sampler.samples_in(1) for sampler in ranks] == [(4, 12)] * 3
    first, second = last[1].tolist()
    ends = [list(sampler)[-1][1].tolist() for sampler in ranks]
    assert ends == [[first, second], [second, first], [first, second]]
    assert [len(list(TrainSampler(26, 1, 0, rank, 3))[-1][1]) for rank in range(3)] == [1, 1, 1]  # no norm can train


@pytest.mark.parametrize(("size", "batch_size", "seen"), [(17, 8, 16), (18, 8, 18), (1, 8, 1), (5, 1, 5), (16, 8, 16)])
def test_only_a_tail_of_one_is_left_out(size, batch_size, seen):
    assert len(epoch_of(TrainSampler(size, batch_size, seed=0))) == seen


def test_balanced_draws_every_class_equally_often_and_all_its_samples():
    labels = torch.tensor([0] * 900 + [1] * 90 + [3] * 10)
    sampler = TrainSampler(1000, 50, seed=0, labels=labels)
    drawn = torch.tensor([i for epoch in range(10) for i in epoch_of(sampler, epoch)])
    shares = torch.bincount(labels[drawn], minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]), atol=0.02, rtol=0)
    assert set(drawn[labels[drawn] == 3].tolist()) == set(range(990, 1000))
    ranks = [epoch_of(TrainSampler(1000, 50, 0, rank, 2, labels=labels)) for rank in (0, 1)]
    assert torch.stack([torch.tensor(r) for r in ranks], 1).flatten().tolist() == epoch_of(sampler, 0)


def test_evaluation_sees_every_sample_once_in_equally_many_batches():
    for size in range(4, 40):
        for world_size in (1, 2, 3, 4):
            for batch_size in (1, 2, 5, 64):
                samplers = [EvalSampler(size, batch_size, rank, world_size) for rank in range(world_size)]
                ranks = [list(sampler) for sampler in samplers]
                assert {len(batches) for batches in ranks} == {len(samplers[0])}
                indices = [batch for batches in ranks for _, batch in batches]
                assert sorted(torch.cat(indices).tolist()) == list(range(size))
                assert all(0 < len(batch) <= batch_size + (world_size > 1) for batch in indices)


def test_too_few_samples_for_the_processes():
    with pytest.raises(DataError, match="3 samples to evaluate are too few for 4 processes"):
        EvalSampler(3, 8, 0, 4)
    with pytest.raises(DataError, match="3 training samples are too few for 4 processes"):
        TrainSampler(3, 8, 0, 0, 4)
