"""Time left, and lines in a log file."""

import time

import pytest
from tiny_benchmark import call

from pl_personalize.runner import TrainingOptions
from pl_personalize.runner import progress as module
from pl_personalize.runner.progress import Progress
from pl_personalize.stages.work import Work


def work(kind, number=0):
    return Work(f"experts/seed1/{kind}/task{number}", lambda: None)


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def do(progress, clock, one, seconds):
    with progress.stage(one):
        clock.now += seconds


def test_the_time_left_is_weighted_by_the_kinds_of_the_stages(clock):
    trains, tests = [work("train", k) for k in range(3)], [work("test", k) for k in range(10)]
    progress = Progress([*trains, *tests], finished=4)
    assert progress.left() is None
    do(progress, clock, trains[0], 100)
    assert progress.left() is None  # no test has been seen
    do(progress, clock, tests[0], 2)
    assert progress.left() == 2 * 100 + 9 * 2
    do(progress, clock, trains[1], 50)
    assert progress.left() == 75 + 9 * 2
    for one in tests[1:]:
        do(progress, clock, one, 2)
    assert progress.left() == 75
    do(progress, clock, trains[2], 60)
    assert progress.left() == 0
    assert progress.seconds == {"train": 210, "test": 20}


def test_a_stage_that_fails_is_not_counted(clock):
    progress = Progress([work("train"), work("test")], finished=0)
    with pytest.raises(RuntimeError), progress.stage(work("train")):
        raise RuntimeError
    do(progress, clock, work("test"), 3)
    assert progress.left() is None


def test_without_a_terminal_there_is_a_line_in_each_interval(capsys):
    works = [work("train"), work("test")]
    printed, progress = [], Progress(works, finished=1, interval=0.02)
    with progress.shown():
        with progress.stage(works[0]):
            progress.show("train/task0 epoch 3/9")
            until = time.monotonic() + 20
            while len(printed) < 3 and time.monotonic() < until:  # the test ends as soon as there are three lines
                printed += capsys.readouterr().err.splitlines()
                time.sleep(0.01)
        with progress.stage(works[1]):
            pass
    assert len(printed) >= 3
    assert set(printed) == {"1/3 stages in 0 s: train/task0 epoch 3/9"}
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "3/3 stages in 0 s: experts/seed1/test/task0"


def test_nothing_is_written_where_nothing_is_done(capsys):
    with Progress([], finished=7, interval=0.001).shown():
        time.sleep(0.01)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_with_stage_epoch_and_time_left(capsys, monkeypatch, clock):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress([work("train", 1), work("train", 2)], finished=2)
    with progress.shown():
        do(progress, clock, work("train", 1), 600)
        progress.show("experts/seed1/train/task2 epoch 7/20")
    shown = capsys.readouterr().err
    assert "experts/seed1/train/task2 epoch 7/20" in shown
    assert "about 10 min left" in shown
    assert "3/4 stages" in shown


def test_a_stage_shows_its_epochs(tmp_path, monkeypatch):
    shown, show = [], Progress.show
    monkeypatch.setattr(Progress, "show", lambda self, state: (shown.append(state), show(self, state))[1])
    call(tmp_path, methods="Joint+FT", training=TrainingOptions(epochs=2, lr=0.1))
    assert shown[:3] == ["Joint/seed1/train/all", *(f"Joint/seed1/train/all epoch {k}/2" for k in (1, 2))]
    assert "Joint/seed1/adapt/Joint/FT/ann/model2-task1 epoch 10/10" in shown
