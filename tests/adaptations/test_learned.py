"""The adaptation `learned`: the merge of all tasks' experts, learned on the user's images of all tasks."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_benchmark import Tiny, plain

from pl_personalize import learn_merge
from pl_personalize.adaptations import Received, find_adaptation
from pl_personalize.adaptations.adaptation import Case

TASKS = 2


class Device:
    """The unlabelled images of a user for a task."""

    def __init__(self, task):
        self.user, self.split = "bob", Tiny(images=10).user_split("bob", task)[0]

    def images(self):
        return self.split.images.split(4)

    def as_input(self, batch):
        return batch


def network(seed):
    torch.manual_seed(seed)
    return plain(2).eval()


def _cases(experts, count=TASKS):
    merged = network(9)
    cases = []
    for task in range(count):
        one = network(5 + task)
        one.body.load_state_dict(merged.body.state_dict())
        received = Received(TASKS - 1, task, seed=3, experts=[expert.body.state_dict() for expert in experts])
        cases.append(Case(one, Device(task), received))
    return cases


def test_learned_equals_learn_merge_from_the_merge_that_was_sent():
    experts = [network(20 + task) for task in range(TASKS)]
    cases = _cases(experts)
    for expert, case in zip(experts, cases, strict=True):
        expert.head.load_state_dict(case.network.head.state_dict())
    images = [case.device.split.images.split(4) for case in cases]  # the device's batches, and no smaller ones
    start = {name: value.clone() for name, value in cases[0].network.state_dict().items()}
    states = [expert.state_dict() for expert in experts]
    expected = learn_merge(cases[0].network, states, images, start, parameters="all", epochs=2, seed=3)

    found = find_adaptation("learned", {"parameters": "all", "epochs": 2}).adapt_tasks(cases)

    for task, entries in enumerate(found):
        names = {name: name.replace("head", f"heads.{task}") for name in start}
        assert entries.keys() == names.keys()
        assert all(torch.equal(entries[name], expected[other]) for name, other in names.items())
        assert not torch.equal(entries["body.0.weight"], start["body.0.weight"])


def test_the_first_expert_stays_as_it_is():
    received = Received(0, 0, experts=[network(20).body.state_dict()])

    assert find_adaptation("learned").adapt(network(9), Device(0), received) == {}


def test_learned_needs_the_images_of_all_tasks():
    experts = [network(20 + task) for task in range(TASKS)]

    with pytest.raises(MisconfigurationException, match="all 2 tasks of the merge are needed; there are those of 1"):
        find_adaptation("learned").adapt_tasks(_cases(experts, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "body"}, "learned: parameters must be one of .* got 'body'"),
        ({"per": "layer"}, "learned: per must be one of .* got 'layer'"),
        ({"loss": "l1"}, "learned: loss must be one of .* got 'l1'"),
        ({"epochs": 0}, "learned: epochs must be 1 or more; got 0"),
        ({"batch_size": 0}, "learned: batch_size must be 1 or more; got 0"),
        ({"lr": -1.0}, "learned: lr must be positive; got -1.0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        find_adaptation("learned", options)
