"""The train loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dn_detr.checkpoint import CheckpointError, CheckpointWriter
from dn_detr.distributed import (
    all_gather,
    any_process,
    barrier,
    broadcast_from_main,
    is_lost_connection,
    is_main,
    world_size,
)
from dn_detr.errors import image_name
from dn_detr.protocols import Evaluator, Sample, TestLoader, TrainLoader

from .evaluation import EvaluationStopped, evaluate_model
from .memory import OutOfMemory
from .metrics import Record, RunningSums, evaluation_record, merge_records
from .nonfinite import NonFiniteError
from .optimizer import learning_rates
from .run_state import RunState, load_last
from .schedule import LearningRateRule, set_learning_rates
from .settings import TrainSettings
from .step import Outcome, StepResult
from .stopping import Stopped, StopRequest, WaitInterrupted
from .writers import MetricsFile, WriterError, finite_record

logger = logging.getLogger(__name__)

# With train.oom=skip: more steps in a row without memory are no matter of single images.
_MOST_OUT_OF_MEMORY_IN_A_ROW = 10


@dataclass(eq=False, repr=False)
class Trainer:
    """Runs optimizer steps until the timetable ends; logs, saves and evaluates when they are due.

    Args:
        state: the model, the optimizer, the callbacks and all else that changes.
        loader: endless, of this rank's batches.
        test_loader: of this rank's share of the test images.
        evaluators: by name: "" for the model, and one for each of the callbacks' models.
        checkpoints: writes them.
        stop: whether this process was asked to stop.
        lr_rule: factor of the learning rate by epoch.
        settings: the `train` section.
    """

    state: RunState
    loader: TrainLoader
    test_loader: TestLoader
    evaluators: Mapping[str, Evaluator]
    checkpoints: CheckpointWriter
    stop: StopRequest
    lr_rule: LearningRateRule
    settings: TrainSettings

    _metrics_file: MetricsFile | None = field(default=None, init=False)  # on the main process
    _saved_iteration: int | None = field(init=False)
    _has_unwritten: bool = field(default=False, init=False)  # the newest checkpoint
    _has_stagnated: bool = field(default=False, init=False)
    _out_of_memory_in_a_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._saved_iteration = self.state.iteration

    def run(self) -> dict[str, Any]:
        """Train to the end of the timetable, or until results stagnate.

        Returns:
            Metrics of the last evaluation; an empty dict on other ranks than the main process.

        Raises:
            Stopped: on request, after saving.
            NonFiniteError: a loss or gradient became NaN or infinite, and the policy does not
                allow to go on.
            OutOfMemory: the same for memory.
            CheckpointError: the last checkpoint could not be written.
        """
        state = self.state
        failed = True
        try:
            self._open_metrics_file()
            state.callbacks.start(state)
            self._resume_evaluation()
            if self._is_finished():
                logger.info("nothing left to train: %d iterations are done", state.iteration)
            else:
                self._train()
            self._save_at_the_end()
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            self.checkpoints.close()
            if self._metrics_file is not None:
                self._metrics_file.close()
            state.callbacks.end(state, failed=failed)
        return dict(state.results or {}) if is_main() else {}

    def _train(self) -> None:
        state, settings, is_due = self.state, self.settings, self.state.timetable.is_due
        state.model.train()
        batches = iter(self.loader)
        # after making the iterator, because a loader may draw a seed for its workers
        state.restore_random_numbers()
        while not self._is_finished():
            result = self._step(batches)
            has_rolled_back = self._handle(result)
            if not has_rolled_back and is_due(settings.log_period, state.iteration):
                self._log()
            if result.stop:
                self._save_and_stop()
            if is_due(settings.checkpoint.period, state.iteration):
                self._save()
            if is_due(settings.eval_period, state.iteration) and state.results is None:
                self._evaluate()
            self._report_failed_writes()

    def _is_finished(self) -> bool:
        return self._has_stagnated or self.state.iteration >= self.state.timetable.max_iter

    def _step(self, batches: Iterator[Sequence[Sample]]) -> StepResult:
        started = time.perf_counter()
        state, timetable = self.state, self.state.timetable
        epoch = timetable.epoch(state.iteration)
        set_learning_rates(state.optimizer, self.lr_rule(epoch, timetable.total_epochs))
        try:
            # A request to stop need not wait for images where no other rank waits for the step.
            with self.stop.interruptible() if world_size() == 1 else nullcontext():
                samples = next(batches)
        except WaitInterrupted:
            self._save_and_stop()
        state.batches_drawn += 1
        data_seconds = time.perf_counter() - started
        wants_stop = self.stop.reason is not None
        try:
            result = state.step(samples, state.iteration + 1, wants_stop=wants_stop)
        except (NonFiniteError, OutOfMemory):
            raise
        except Exception as error:
            images = ", ".join(map(image_name, samples))
            is_lost = is_lost_connection(error)
            why = "lost the connection to another rank" if is_lost else f"failed on {images}"
            logger.error("iteration %d %s", state.iteration + 1, why)
            raise
        state.iteration += 1
        state.results = None
        if result.outcome in (Outcome.APPLIED, Outcome.OVERFLOW):
            state.metrics.add_step(result)
        state.callbacks.each(lambda callback: callback.after_step(state, samples, result))
        state.metrics.add_times(
            images=len(samples), data_seconds=data_seconds, seconds=time.perf_counter() - started
        )
        return result

    def _handle(self, result: StepResult) -> bool:
        """Do what the settings say about a step that changed no weights; whether to roll back."""
        state, outcome = self.state, result.outcome
        is_out_of_memory = outcome is Outcome.OUT_OF_MEMORY
        self._out_of_memory_in_a_row = self._out_of_memory_in_a_row + 1 if is_out_of_memory else 0
        if outcome is Outcome.APPLIED:
            return False
        if is_main():  # of all ranks together, so one counts
            state.metrics.count(f"{outcome.value}_steps")
        if is_out_of_memory:
            logger.warning("%s\nthe step is skipped (train.oom=skip)", result.report)
            if self._out_of_memory_in_a_row >= _MOST_OUT_OF_MEMORY_IN_A_ROW:
                raise OutOfMemory(
                    f"{result.report}\n{_MOST_OUT_OF_MEMORY_IN_A_ROW} steps in a row did not fit"
                )
        if outcome is not Outcome.NONFINITE:
            return False
        state.nonfinite_steps += 1
        policy, limit = self.settings.nonfinite, self.settings.nonfinite_limit
        if state.nonfinite_steps > limit:
            raise NonFiniteError(
                f"{result.report}\n{state.nonfinite_steps} steps of this run were not finite, "
                f"more than train.nonfinite_limit={limit}"
            )
        if is_main():  # the report is about all ranks
            logger.warning(
                "%s\ntrain.nonfinite=%s; number %d of at most %d",
                result.report, policy, state.nonfinite_steps, limit,
            )  # fmt: skip
        if policy == "rollback":
            self._roll_back(result)
        return policy == "rollback"

    def _roll_back(self, result: StepResult) -> None:
        """Become the last checkpoint, but go on with images that come after these."""
        state = self.state
        drawn, nonfinite_steps = state.batches_drawn, state.nonfinite_steps
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            logger.error("%s", error)  # an older one has to do
        barrier()
        checkpoint = load_last(state.output_dir)
        if checkpoint is None:
            raise NonFiniteError(
                f"{result.report}\nthere is no checkpoint to roll back to yet; lower "
                "train.checkpoint.period, or use train.nonfinite=skip"
            )
        state.restore(checkpoint)
        state.restore_random_numbers()
        state.batches_drawn, state.nonfinite_steps = drawn, nonfinite_steps
        if is_main():
            state.metrics.count("nonfinite_steps")
        self._open_metrics_file()
        self._save_again()  # it would draw the bad images again
        if is_main():
            logger.warning("rolled back to %s", checkpoint.folder)

    def _log(self) -> None:
        """Write a log record: means since the last one, over all ranks."""
        state = self.state
        merged = merge_records(all_gather(state.metrics.of_this_rank(state.step.device)))
        state.metrics = RunningSums()
        # every step may have been skipped, and every gradient have overflowed
        self._write({"loss": None, "grad_norm": None, **merged, **learning_rates(state.optimizer)})

    def _write(self, numbers: Record) -> None:
        """Add a record to metrics.jsonl, and pass it to the callbacks."""
        if self._metrics_file is not None:
            iteration = self.state.iteration
            epoch = self.state.timetable.epoch(iteration)
            record = finite_record({"iteration": iteration, "epoch": epoch, **numbers})
            self._metrics_file.write(record)
            self.state.callbacks.each(lambda callback: callback.on_log(self.state, record))

    def _open_metrics_file(self) -> None:
        """Go on with metrics.jsonl after this iteration; later records are removed."""
        if self._metrics_file is not None:
            self._metrics_file.close()
        if is_main():
            self._metrics_file = MetricsFile(
                self.state.output_dir,
                self.state.iteration,
                is_evaluated=self.state.results is not None,
                expected=self.state.log_records,
            )

    def _save(self) -> None:
        """Write a checkpoint of this iteration, unless there is one."""
        if self._saved_iteration == self.state.iteration:
            return
        if self._metrics_file is not None:
            self._metrics_file.flush_to_disk()
            self.state.log_records = self._metrics_file.records
        self.checkpoints.save(self.state.snapshot())
        self._saved_iteration, self._has_unwritten = self.state.iteration, False

    def _save_again(self) -> None:
        """Replace the checkpoint of this iteration, with the results of its evaluation."""
        self._saved_iteration = None
        self._save()
        self._record_evaluation()

    def _save_at_the_end(self) -> None:
        """Have a checkpoint of this iteration on the disk, or raise a CheckpointError."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self._has_unwritten = True
            logger.error("%s; tried once more, because the run ends", error)
        is_missing = self._has_unwritten or self._saved_iteration != self.state.iteration
        if any_process(is_missing, device=self.state.step.device)[0]:
            self._save_again()
            try:
                self.checkpoints.wait()
            finally:
                barrier()
        if self._metrics_file is not None and self._metrics_file.was_removed:
            raise WriterError(
                f"{self._metrics_file.path} was removed or renamed during the run, so records, and "
                "whatever else was there, are missing; the last checkpoint is saved"
            )

    def _save_and_stop(self) -> NoReturn:
        if self.state.iteration > 0:
            self._save_at_the_end()
        reason = self.stop.reason or "another process was asked to"
        self.stop.has_saved()
        done = f"stopped after iteration {self.state.iteration} ({reason})"
        if is_main():
            logger.warning(done)
        raise Stopped(f"{done}; --resume continues")

    def _report_failed_writes(self) -> None:
        failures = self.checkpoints.failures()
        if not failures:
            return
        self._has_unwritten = True
        try:
            self.checkpoints.wait()  # until `best` points at what it will point at
        except CheckpointError as error:
            failures.append(error)
        for failure in failures:
            logger.error("%s; training goes on, and the next checkpoint is tried", failure)
        if is_main():
            self.state.fall_back_to_best_checkpoint()

    def _evaluate(self) -> None:
        """Evaluate the model and those of the callbacks; keep the best checkpoint.

        It comes after saving: an evaluation that fails or is interrupted costs no training.
        """
        state = self.state
        results: dict[str, Any] = {}

        def should_stop() -> bool:
            return any_process(self.stop.reason is not None, device=state.step.device)[0]

        try:
            for name, model in {"": state.model, **state.callbacks.models()}.items():
                evaluator = self.evaluators[name]
                found = evaluate_model(model, self.test_loader, evaluator, should_stop)
                if name and found:
                    logger.info("these were the results of %s", name)
                results |= {name: found} if name and found else found
        except EvaluationStopped:
            self._save_and_stop()
        state.results = results = broadcast_from_main(results)
        self._write(evaluation_record(state.results))
        if is_main():
            state.best.update(state.results)
        if broadcast_from_main(state.best.is_best):
            self._save()
        self._record_evaluation()
        state.callbacks.each(lambda callback: callback.after_evaluation(state, results))
        self._agree_on_stagnation()

    def _resume_evaluation(self) -> None:
        """Do what a run that was killed at this iteration may have left undone."""
        state = self.state
        if state.best.is_best:
            self._record_evaluation()
        is_due = state.timetable.is_due(self.settings.eval_period, state.iteration)
        if state.iteration > 0 and state.results is None and is_due:
            self._evaluate()
        else:
            self._agree_on_stagnation()

    def _record_evaluation(self) -> None:
        """Add the results of an evaluation of this iteration to its checkpoint, if it has one."""
        iteration, results = self.state.iteration, self.state.results
        if is_main() and results is not None and self._saved_iteration == iteration:
            is_best = self.state.best.is_best
            if self._metrics_file is not None:
                self._metrics_file.flush_to_disk()
            self.checkpoints.record_evaluation(iteration, results, is_best=is_best)

    def _agree_on_stagnation(self) -> None:
        self._has_stagnated = broadcast_from_main(self.state.best.has_stagnated)
        if self._has_stagnated:
            logger.info("early stopping: %s", self.state.best.describe())
