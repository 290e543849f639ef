"""What a step draws: a function of where the training stands."""

import random
from types import SimpleNamespace

import numpy as np
import torch

from boltlab.training.resume_state import Resume


def test_what_a_step_draws_follows_seed_rank_epoch_and_batch():
    """FAULTS 26: dropout differs between processes and steps, and is the same again wherever a run goes on."""
    drawn = {}
    places = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)]
    for seed, rank, epoch, batch in places:
        ready = SimpleNamespace(current=SimpleNamespace(ready=batch))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=ready))
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(current_epoch=epoch, fit_loop=loop, strategy=strategy)
        resume = Resume(SimpleNamespace(seed=seed, shares=(2, rank), trainer=trainer), None)
        for before in range(2):
            torch.rand(batch + before), random.random(), np.random.rand()  # noqa: NPY002  # whatever was drawn before
            resume._seed_step()
            found = (*torch.rand(4).tolist(), random.random(), float(np.random.rand()))  # noqa: NPY002
            assert drawn.setdefault((seed, rank, epoch, batch), found) == found
    assert len(set(drawn.values())) == len(drawn) == 5
