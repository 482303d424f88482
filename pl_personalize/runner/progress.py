"""Progress of an experiment: a bar on a terminal, and a line now and then in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm.auto import tqdm

from pl_personalize.stages.work import Work


class Progress:
    """Shows which stage runs, its epoch, and the time left.

    The time left is estimated from the mean duration of each kind of stage, as a training takes much longer than a
    test; it is shown once every kind that is still to come has been seen. If standard error is no terminal, a line is
    written every ``interval`` seconds.
    """

    def __init__(self, works: Sequence[Work], finished: int, *, interval: float = 30) -> None:
        self._interval = interval
        self._pending = Counter(work.kind for work in works)
        self._total, self._done = finished + len(works), finished
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._state, self._began = "", time.monotonic()
        self._bar = tqdm(
            total=self._total,
            initial=finished,
            disable=not works or not sys.stderr.isatty(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} stages [{elapsed}{postfix}]",
        )
        self._over = threading.Event()
        self._writes_lines = bool(works) and not sys.stderr.isatty()

    @property
    def seconds(self) -> dict[str, float]:
        """Time taken by each kind of stage."""
        return {kind: sum(values) for kind, values in self._seconds.items()}

    def left(self) -> float | None:
        """Estimated seconds left; ``None`` if a kind of stage that is still to come has not been seen."""
        kinds = [kind for kind, count in self._pending.items() if count]
        if any(not self._seconds[kind] for kind in kinds):
            return None
        return sum(self._pending[k] * sum(self._seconds[k]) / len(self._seconds[k]) for k in kinds)

    def show(self, state: str) -> None:
        """Show what is going on, such as a stage and its epoch."""
        self._state = state
        left = self.left()
        self._bar.set_description_str(state, refresh=False)
        self._bar.set_postfix_str("" if left is None else f"about {_duration(left)} left")

    @contextmanager
    def stage(self, work: Work) -> Iterator[None]:
        """Count a stage, and measure its duration."""
        self.show(work.name)
        began = time.monotonic()
        yield
        self._seconds[work.kind].append(time.monotonic() - began)
        self._pending[work.kind] -= 1
        self._done += 1
        self._bar.update()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the progress while the stages inside are done."""
        thread = threading.Thread(target=self._write_lines, daemon=True)
        if self._writes_lines:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._bar.close()
            if self._writes_lines:
                thread.join()
                self._write_line()

    def _write_lines(self) -> None:
        while not self._over.wait(self._interval):
            self._write_line()

    def _write_line(self) -> None:
        left, elapsed = self.left(), _duration(time.monotonic() - self._began)
        rest = "" if left is None or self._done == self._total else f", about {_duration(left)} left"
        print(f"{self._done}/{self._total} stages in {elapsed}{rest}: {self._state}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours.

    Example:
        >>> _duration(59.6), _duration(600), _duration(9000)
        ('60 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
