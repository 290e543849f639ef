"""Errors of torch's DDP, as torch raises them, and what is said of them."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from boltlab.ground.errors import UserError
from boltlab.processes import ends
from boltlab.processes.explained import explained


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.step = 0

    def forward(self, x):
        """Of the three parts the first and, by turns, the second or the third."""
        self.step += 1
        return self.parts[0](x) + self.parts[1 + self.step % 2](x)


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def steps(net):
    for _ in range(4):
        net(torch.ones(1, 2)).sum().backward()


CASES = {
    "parameters without a gradient": ({}, "(numbers 2, 3 of its parameters())"),
    "a graph that is not static": ({"static_graph": True}, "trainer.strategy.static_graph=false"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_of_ddp_is_one_line_with_the_cure(alone, tmp_path, monkeypatch, case):
    how, words = CASES[case]
    monkeypatch.setenv("RANK", "0")
    net = DistributedDataParallel(Parts(), **how)
    with pytest.raises(RuntimeError) as caught, ends.last_word(tmp_path):
        steps(net)
    said = explained(caught.value)
    assert words in said and "trainer.strategy." in said and "\n" not in said
    error = ends.cause(ends.reports(tmp_path), {0: 1}, 2)
    assert type(error) is UserError and str(error) == said


def test_another_error_keeps_its_traceback():
    assert explained(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_a_batch_norm_with_one_sample_is_told_the_cure():
    with pytest.raises(ValueError, match="more than 1 value") as caught:
        nn.BatchNorm1d(3)(torch.ones(1, 3))
    assert "data.batch_size" in explained(caught.value) and "[1, 3]" in explained(caught.value)
