import numpy as np
import pytest
import torch

from pl_personalize.functional.seeding import derive_seed, reseed


def test_integers_of_other_libraries_are_integers():
    assert derive_seed(np.int64(27), "x", torch.tensor(3)) == derive_seed(27, "x", 3)
    with pytest.raises(TypeError):
        derive_seed(27.0)


def test_it_seeds_what_the_cpu_draws_as_torch_does(global_state):
    torch.manual_seed(2**62 + 7)
    expected = torch.rand(3)
    reseed(torch.device("cpu"), 2**62 + 7)
    assert torch.equal(torch.rand(3), expected)


def test_it_seeds_an_accelerators_own_generator(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    with torch.random.fork_rng(devices=[]):
        reseed(torch.device("cuda", 0), 5)
    assert seeds == [5]
