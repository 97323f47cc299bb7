"""The story of a step. Whatever a batch comes from and whoever trains on it, this is all that happens."""

from __future__ import annotations

from miles_core.run import Outcome, Run


def train(run: Run) -> Outcome:
    """Train from `run.step` to `run.num_steps`; version k of the weights is what step k left behind.

    A checkpoint always stands between two steps, and everything written after it is forgotten on resume, so a run may be
    killed at any moment. Ctrl-C is heeded after the step in progress.
    """
    with run.progress, run.stop:
        run.begin()
        while run.step < run.num_steps and not run.stop.requested:
            clock = run.clock()
            with clock("rollout"):
                portion = run.feed.next(run.step + 1)
            if portion is None:
                break
            run.write_samples(portion)
            with clock("train"):
                stats = run.train_on(portion)
            run.step += 1
            portion.settle()
            with clock("publish"):
                run.publish()
            with clock("eval"):
                scores = run.evaluate(at_end=portion.is_last)
            run.record(portion, stats, scores, clock)
            run.checkpoint()
            if portion.is_last:
                break
        return run.finish()
