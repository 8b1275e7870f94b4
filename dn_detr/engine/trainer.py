"""The train loop."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

from dn_detr.checkpoint import CheckpointError, CheckpointWriter
from dn_detr.data import count_skipped, describe_skipped
from dn_detr.distributed import (
    all_gather,
    any_process,
    barrier,
    broadcast_from_main,
    is_main,
    world_size,
)
from dn_detr.evaluation import EvaluationStopped

from .memory import OutOfMemory, Sample
from .metrics import Interval, Row, average_over_ranks, evaluation_row, peak_memory_mib
from .nonfinite import NonFiniteError
from .optimizer import learning_rates
from .progress import Progress
from .run_state import RunState, load_last
from .schedule import LearningRateRule, Timetable, set_learning_rates
from .settings import TrainSettings
from .step import Outcome, StepResult, images_named_on_failure
from .stopping import Stopped, StopRequest, WaitInterrupted
from .writers import RunWriters

logger = logging.getLogger(__name__)

# With train.oom=skip: this many steps in a row without memory are no matter of single images.
_MOST_OUT_OF_MEMORY_IN_A_ROW = 10


class Trainer:
    """Runs optimizer steps until the timetable ends; logs, saves and evaluates when they are due.

    Args:
        state: the model, the step and all else that changes.
        loader: endless, of this process's batches.
        checkpoints: writes them.
        open_rows: `writers.open_writers` for this run: opens what takes the rows of metrics.
        evaluate: given a function that says whether to stop, which all processes call equally
            often, returns the results (an empty dict on other processes than the first) or raises
            EvaluationStopped.
        stop: whether this process was asked to stop.
        timetable: length of the run.
        lr_rule: factor of the learning rate by epoch.
        settings: the `train` section.
    """

    def __init__(
        self,
        state: RunState,
        loader: Any,
        checkpoints: CheckpointWriter,
        *,
        open_rows: Callable[..., RunWriters],
        evaluate: Callable[[Callable[[], bool]], dict[str, Any]],
        stop: StopRequest,
        timetable: Timetable,
        lr_rule: LearningRateRule,
        settings: TrainSettings,
    ) -> None:
        self._state = state
        self._step = state.step
        self._loader = loader
        self._checkpoints = checkpoints
        self._open_rows = open_rows
        self._evaluate = evaluate
        self._stop = stop
        self._timetable = timetable
        self._lr_rule = lr_rule
        self._settings = settings
        self._rows = RunWriters()
        self._saved_iteration: int | None = state.iteration
        self._has_unwritten = False  # whether something of the newest checkpoint was not written
        self._has_stagnated = False
        self._out_of_memory_in_a_row = 0

    def run(self) -> dict[str, Any]:
        """Train to the end of the timetable, or until results stagnate.

        Returns:
            Metrics of the last evaluation; an empty dict on other processes than the first.

        Raises:
            Stopped: on request, after saving.
            NonFiniteError: a loss or gradient became NaN or infinite, and the policy does not
                allow to go on.
            OutOfMemory: the same for memory.
            CheckpointError: the last checkpoint could not be written.
        """
        self._start_rows()
        failed = True
        try:
            if self._state.is_best:  # a run that was killed may not have pointed `best` at it
                self._record_evaluation()
            self._evaluate_if_interrupted()
            self._train()
            self._save_for_good()
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            self._checkpoints.close()
            self._rows.close(failed=failed)
        return self._state.metrics or {}

    def _train(self) -> None:
        self._agree_on_stagnation()
        if self._is_finished():
            logger.info("nothing left to train: %d iterations are done", self._state.iteration)
            return
        self._state.model.train()
        batches = iter(self._loader)
        # after making the iterator, because a loader may draw a seed for its workers
        self._state.restore_random_numbers()
        with Progress(self._timetable, self._state.iteration, logger) as progress:
            while not self._is_finished():
                done = self._state.iteration
                result = self._one_iteration(batches)
                is_new = self._state.iteration > done  # not after a rollback
                progress.move_to(self._state.iteration)
                if is_new:
                    self._log_if_due(progress)
                self._report_skipped_files()
                if result.stop:
                    self._save_and_stop()
                if is_new:
                    self._save_if_due()
                    self._evaluate_if_due()
                self._report_failed_writes()

    def _is_finished(self) -> bool:
        return self._has_stagnated or self._state.iteration >= self._timetable.max_iter

    def _one_iteration(self, batches: Any) -> StepResult:
        started = time.perf_counter()
        state = self._state
        epoch = self._timetable.epoch(state.iteration)
        set_learning_rates(self._step.optimizer, self._lr_rule(epoch, self._timetable.total_epochs))
        batch = self._next_batch(batches)
        data_seconds = time.perf_counter() - started
        with images_named_on_failure(batch, state.iteration + 1):
            wants_stop = self._stop.reason is not None
            result = self._step(batch, state.iteration + 1, wants_stop=wants_stop)
        state.iteration += 1
        state.metrics = None
        self._record(result, batch)
        state.interval.record(
            result if result.names and result.outcome is not Outcome.NONFINITE else None,
            images=len(batch),
            data_seconds=data_seconds,
            seconds=time.perf_counter() - started,
        )
        self._handle(result)
        return result

    def _next_batch(self, batches: Any) -> Sequence[Sample]:
        """Wait for images; with other processes waiting for this one, whatever happens."""
        if self._state.stability is not None:
            self._state.stability.begin_iteration(self._data_epoch())
        # A request to stop need not wait for images where no other process waits for the step.
        is_alone = world_size() == 1
        try:
            with self._stop.interruptible() if is_alone else nullcontext():
                batch: Sequence[Sample] = next(batches)
        except WaitInterrupted:
            self._save_and_stop()
        self._state.batches_drawn += 1
        self._state.skipped.update(count_skipped(batch))
        return batch

    def _data_epoch(self) -> int:
        """Return which epoch of the data the next batch belongs to."""
        return self._state.batches_drawn // self._timetable.iterations_per_epoch

    def _record(self, result: StepResult, batch: Sequence[Sample]) -> None:
        """Take note of what the step says apart from its losses."""
        interval, stability = self._state.interval, self._state.stability
        interval.count("skipped_images", count_skipped(batch).total())
        found = [piece for piece in result.diagnostics if piece is not None]
        for piece in found:
            interval.record_denoising(piece.denoising_correct, piece.denoising_total)
        if stability is not None and found:
            queries = [query for piece in found for query in piece.queries]
            stability.update([sample["instances"].gt_ids for sample in batch], queries)

    def _handle(self, result: StepResult) -> None:
        """Do what the settings say about a step that changed no weights."""
        is_out_of_memory = result.outcome is Outcome.OUT_OF_MEMORY
        self._out_of_memory_in_a_row = self._out_of_memory_in_a_row + 1 if is_out_of_memory else 0
        if result.outcome is Outcome.APPLIED:
            if self._state.ema is not None:
                self._state.ema.update_parameters(self._state.model)
        elif result.outcome is Outcome.OVERFLOW:
            self._state.interval.count("overflow_steps")
        elif is_out_of_memory:
            self._skip_out_of_memory(result)
        else:
            self._survive_nonfinite(result)

    def _skip_out_of_memory(self, result: StepResult) -> None:
        self._state.interval.count("oom_steps")
        logger.warning("%s\nthe step is skipped (train.oom=skip)", result.report)
        if self._out_of_memory_in_a_row >= _MOST_OUT_OF_MEMORY_IN_A_ROW:
            raise OutOfMemory(
                f"{result.report}\n{_MOST_OUT_OF_MEMORY_IN_A_ROW} steps in a row did not fit"
            )

    def _survive_nonfinite(self, result: StepResult) -> None:
        self._state.interval.count("nonfinite_steps")
        self._state.nonfinite_steps += 1
        limit = self._settings.nonfinite_limit
        if self._state.nonfinite_steps > limit:
            raise NonFiniteError(
                f"{result.report}\n{self._state.nonfinite_steps} steps of this run were not "
                f"finite, more than train.nonfinite_limit={limit}"
            )
        if is_main():  # the report is about all processes
            logger.warning(
                "%s\ntrain.nonfinite=%s; number %d of at most %d", result.report,
                self._settings.nonfinite, self._state.nonfinite_steps, limit,
            )  # fmt: skip
        if self._settings.nonfinite == "rollback":
            self._roll_back(result)

    def _roll_back(self, result: StepResult) -> None:
        """Become the last checkpoint, but go on with images that come after these."""
        state = self._state
        drawn, dropped, skipped = state.batches_drawn, state.nonfinite_steps, state.skipped
        try:
            self._finish_writing()
        except CheckpointError as error:
            logger.error("%s", error)  # an older one has to do
        checkpoint = load_last(self._settings.output_dir)
        if checkpoint is None:
            raise NonFiniteError(
                f"{result.report}\nthere is no checkpoint to roll back to yet; lower "
                "train.checkpoint.period, or use train.nonfinite=skip"
            )
        state.restore(checkpoint)
        state.restore_random_numbers()
        state.batches_drawn, state.nonfinite_steps, state.skipped = drawn, dropped, skipped
        state.interval.count("nonfinite_steps")
        self._start_rows()
        self._save_again()  # it would draw the bad images again
        if is_main():
            logger.warning("rolled back to %s", checkpoint.folder)

    def _log_if_due(self, progress: Progress) -> None:
        if not self._timetable.is_due(self._settings.log_period, self._state.iteration):
            return
        mine = {**self._state.interval.averages(), "memory_mib": peak_memory_mib(self._step.device)}
        if self._state.stability is not None:
            mine |= self._state.stability.ratios()
        row = self._position() | average_over_ranks(mine) | learning_rates(self._step.optimizer)
        self._state.interval = Interval()
        self._rows.write(row)
        progress.show(row)

    def _report_skipped_files(self) -> None:
        """List, at the end of an epoch of the data, the files that could not be read in it."""
        if self._state.batches_drawn % self._timetable.iterations_per_epoch:
            return
        everywhere = sum(all_gather(self._state.skipped), Counter())
        if is_main() and everywhere:
            logger.warning("epoch %d: %s", self._data_epoch(), describe_skipped(everywhere))
        self._state.skipped.clear()

    def _save_if_due(self) -> None:
        if self._timetable.is_due(self._settings.checkpoint.period, self._state.iteration):
            self._save()

    def _save(self) -> None:
        """Write a checkpoint of this iteration, unless there is one."""
        if self._saved_iteration == self._state.iteration:
            return
        self._checkpoints.save(self._state.snapshot(self._timetable.epoch(self._state.iteration)))
        self._saved_iteration, self._has_unwritten = self._state.iteration, False

    def _save_again(self) -> None:
        """Write the checkpoint of this iteration again, with the results of its evaluation."""
        self._saved_iteration = None
        self._save()
        self._record_evaluation()

    def _finish_writing(self) -> None:
        """Wait until every process has written what it is writing."""
        try:
            self._checkpoints.wait()
        finally:
            barrier()

    def _report_failed_writes(self) -> None:
        failures = self._checkpoints.failures()
        if not failures:
            return
        self._has_unwritten = True
        try:
            self._checkpoints.wait()  # until `best` points at what it will point at
        except CheckpointError as error:
            failures.append(error)
        for failure in failures:
            logger.error("%s; training goes on, and the next checkpoint is tried", failure)
        if is_main():
            self._state.forget_lost_best(self._checkpoints.folder)

    def _save_for_good(self) -> None:
        """Have a checkpoint of this iteration on the disk, or raise a CheckpointError."""
        if not self._is_on_disk():
            self._save_again()
            self._finish_writing()

    def _is_on_disk(self) -> bool:
        """Wait, and return whether all processes have written a checkpoint of this iteration."""
        try:
            self._checkpoints.wait()
        except CheckpointError as error:
            self._has_unwritten = True
            logger.error("%s; tried once more, because the run ends", error)
        is_missing = self._has_unwritten or self._saved_iteration != self._state.iteration
        return not any_process(is_missing, device=self._step.device)[0]

    def _save_and_stop(self) -> NoReturn:
        if self._state.iteration > 0:
            self._save_for_good()
        reason = self._stop.reason or "another process was asked to"
        self._stop.has_saved()
        done = f"stopped after iteration {self._state.iteration} ({reason})"
        if is_main():
            logger.warning(done)
        raise Stopped(f"{done}; --resume continues")

    def _evaluate_if_due(self) -> None:
        # Saved before: an evaluation that fails or is interrupted costs no training.
        if not self._timetable.is_due(self._settings.eval_period, self._state.iteration):
            return
        try:
            self._state.metrics = self._evaluate(self._any_process_stops)
        except EvaluationStopped:
            self._save_and_stop()
        if is_main():
            self._rows.write(self._position() | evaluation_row(self._state.metrics))
        self._keep_best()
        self._agree_on_stagnation()

    def _keep_best(self) -> None:
        if is_main():
            self._state.take_results()
        if broadcast_from_main(self._state.is_best):
            self._save()
        self._record_evaluation()

    def _record_evaluation(self) -> None:
        """Add the results of an evaluation of this iteration to its checkpoint, if it has one."""
        iteration, metrics = self._state.iteration, self._state.metrics
        if is_main() and metrics is not None and self._saved_iteration == iteration:
            self._checkpoints.record_evaluation(iteration, metrics, is_best=self._state.is_best)

    def _agree_on_stagnation(self) -> None:
        self._has_stagnated = broadcast_from_main(self._state.has_stagnated)
        if self._has_stagnated and self._state.best is not None:
            logger.info("early stopping: %s", self._state.best.describe())

    def _any_process_stops(self) -> bool:
        return any_process(self._stop.reason is not None, device=self._step.device)[0]

    def _evaluate_if_interrupted(self) -> None:
        if self._state.iteration > 0 and self._state.metrics is None:
            self._evaluate_if_due()

    def _position(self) -> Row:
        iteration = self._state.iteration
        return {"iteration": iteration, "epoch": self._timetable.epoch(iteration)}

    def _start_rows(self) -> None:
        """Open what takes the rows, to go on after this iteration; later rows are removed."""
        self._rows.close(failed=False)
        is_evaluated = self._state.metrics is not None
        self._rows = self._open_rows(self._state.iteration, is_evaluated=is_evaluated)
