"""Two processes that share every batch move as one that reads all of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mose_ros.training.together import Team


def gradient(rows: list[int]) -> torch.nn.ModuleDict:
    """Return a network after the backward pass of a mean loss over some rows of a fixed batch."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({'used': torch.nn.Linear(3, 1), 'idle': torch.nn.Linear(3, 1)})
    batch = torch.randn(8, 3)
    net['used'](batch[rows]).square().mean().backward()
    return net


def work(folder: str) -> None:
    team = Team.join()
    net = gradient(team.share(range(8)))
    alone = net['used'].weight.grad.clone()
    seconds = team.mean_gradients(list(net.parameters()), seconds=10.0 + team.rank)
    assert net['idle'].weight.grad is None, 'what nobody used must not decay'
    np.savez(f'{folder}/{team.rank}', shared=net['used'].weight.grad, alone=alone, clock=seconds)
    team.wait()


def test_two_processes_move_as_one(tmp_path):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])}
    subprocess.run([*launch, __file__, str(tmp_path)], env=environment, check=True, timeout=120)
    whole = gradient(list(range(8)))['used'].weight.grad.numpy()
    for rank in range(2):
        found = np.load(tmp_path / f'{rank}.npz')
        np.testing.assert_allclose(found['shared'], whole, rtol=1e-5)
        assert not np.allclose(found['alone'], whole)
        assert found['clock'] == 10.0, 'the leader holds the clock'


def test_a_batch_that_does_not_divide_is_refused():
    assert Team().share([1, 2, 3]) == [1, 2, 3]
    with pytest.raises(ValueError, match='batch of 3 does not divide among 2'):
        Team(rank=0, size=2).share([1, 2, 3])


if __name__ == '__main__':
    work(sys.argv[1])
