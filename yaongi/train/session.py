"""A run in progress: data, model, optimizer, checkpoints and logs of one configuration, and the operations on them."""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from yaongi import cli
from yaongi.data.row_loader import Batch
from yaongi.data.tokenizer import MODEL_FILE
from yaongi.files import has_sums, read_json_lines
from yaongi.model.hub.push import open_repository, push_folder
from yaongi.model.initialize import PartOf
from yaongi.train.build import build_model, materialize, matrix_momentum_dtype, weight_dtype
from yaongi.train.checkpoint.branch import take_weights, taking_over
from yaongi.train.checkpoint.checkpoints import Checkpoints, rng_state, set_rng_state
from yaongi.train.checkpoint.model_folder import saved_bytes
from yaongi.train.checkpoint.resume import compare_sites, fp8_sites, launch_of, without_what_was_done
from yaongi.train.checkpoint.start import Start, find_start, note_start
from yaongi.train.config import Config, as_dict
from yaongi.train.distributed.agreement import require_same_data, require_same_folder, require_same_weights
from yaongi.train.distributed.errors import place_of
from yaongi.train.distributed.slow_ranks import SlowRanks
from yaongi.train.job import PRETRAINING, Pretraining
from yaongi.train.metrics.display import Display
from yaongi.train.metrics.environment import record_start
from yaongi.train.metrics.meter import Meter
from yaongi.train.metrics.records import Metrics
from yaongi.train.metrics.sinks import Sink, open_sinks
from yaongi.train.optimizer.engine import make_engine
from yaongi.train.optimizer.role_optimizer import RoleOptimizer
from yaongi.train.plan.run_plan import Plan, make_plan
from yaongi.train.plan.shown import show_plan
from yaongi.train.run_folder import (
    CHECKPOINTS,
    METRICS,
    MODEL,
    STOP,
    check_writable,
    lock_run,
    remove_run,
    write_config,
)
from yaongi.train.schedule import Schedule, is_due
from yaongi.train.step.guard import Guard
from yaongi.train.step.stepper import Stepper
from yaongi.world import World

PATIENCE = 3.0  # seconds that training may wait for the previous checkpoint before a message is printed


class Session:
    """A training run: `start` opens it, and leaving its context closes it."""

    def __init__(self, config: Config, world: World, job: Pretraining = PRETRAINING) -> None:
        """Open the data and work out the plan; nothing is written yet.

        Args:
            job: what the run is for.

        Raises:
            ValueError, FileNotFoundError: the data or the configuration doesn't fit; the message is one line.
        """
        self.world, self.job = world, job
        self.loader, self.tokenizer = job.open_data(config)
        asked = config.train.tokens
        self.config = config = job.fit(config, self.tokenizer, self.loader)
        self.plan: Plan = make_plan(config, self.tokenizer, world, len(self.loader.measured))
        train = config.train
        self.schedule = Schedule(train.steps, train.schedule, train.warmup, train.decay, train.final_lr)
        self.display = Display(train.steps, quiet=not world.is_main)
        self.step = 0  # steps done
        self._asked = asked
        self._record = as_dict(config)
        self._resources = contextlib.ExitStack()
        self._sinks: list[Sink] = []
        self._claimed = False
        self._start = Start(None, None)
        run = config.run
        self.checkpoints = Checkpoints(run.out / CHECKPOINTS, world, keep_last=run.keep_last, keep_every=run.keep_every)
        self._launch = launch_of(run)

    def show_plan(self) -> None:
        """Print the plan. Raises ValueError if a source is read too often."""
        show_plan(self.plan, self.config, self.loader, self._asked, self.display.say, self.display.warn)

    def claim(self) -> None:
        """Take the lock of the run's folder and compare the run in it, if the folder is there; write nothing else.

        Raises:
            DamagedError, ValueError: the folder holds another run, or a damaged checkpoint, or a process trains in it.
            OSError: the folder can't be written to.
        """
        run = self.config.run
        check_writable(run.out)
        if not self._claimed and run.out.is_dir():
            if self.world.is_main:
                self._resources.callback(lock_run(run.out).release)
                (run.out / STOP).unlink(missing_ok=True)  # left from a time when nothing ran
            self._claimed = True
            run = without_what_was_done(run, self.checkpoints)
            self.config = dataclasses.replace(self.config, run=run)
        self._start = find_start(self.config, self.checkpoints, self._record, self.tokenizer.hash)

    def start(self) -> None:
        """Build the model, resume from the folder's newest checkpoint if there is one, and open the logs.

        Raises:
            DamagedError: the checkpoint to go on from is damaged.
            ValueError: the folder holds a run with another configuration or other data.
            OSError: the folder can't be written to.
        """
        world, out = self.world, self.config.run.out
        require_same_data(world, self.loader.hash)
        out.mkdir(parents=True, exist_ok=True)
        require_same_folder(world, out)
        self.claim()
        run = self.config.run
        if world.is_main and run.push_to:
            open_repository(run.push_to, private=True)
        if world.is_main and run.fresh:
            remove_run(out)
        world.barrier()
        self._start = start = find_start(self.config, self.checkpoints, self._record, self.tokenizer.hash)
        self._record["lineage"] = start.lineage
        self.checkpoints.prepare()
        self.job.prepare(self.config, self.loader, world, self.display.say)
        self._build()
        if start.found is not None:
            self._restore(*start.found)
            if run.from_step:
                self.checkpoints.point_to(start.found[0])
        elif start.origin is not None and start.origin.meta is not None:
            self._branch(start.origin.folder, start.origin.meta)
        self._require_same_weights()
        skipped = self.loader.skip(run.skip_batches)
        saves = [step for step in range(self.step + 1, self.schedule.steps + 1) if self.due(run.checkpoint_every, step)]
        self.checkpoints.check_room(self._tensors(), saves, out / MODEL, saved_bytes(self.model))
        if len(saves) > 1:
            self.checkpoints.reserve(self._tensors())
        self._open_logs(resumed=start.found is not None)
        if world.is_main:
            note_start(start, self.config, self._record, skipped, self.metrics, self.display.say)

    def _build(self) -> None:
        config, world, plan = self.config, self.world, self.plan
        torch.manual_seed(config.train.seed)
        dtype = weight_dtype(config.train, world.device)
        place = world.device if plan.parallel == "replicate" else "meta"
        self.model = build_model(config, self.tokenizer, place, dtype=dtype)
        engine = make_engine(self.model, config.train, world, plan.parallel, plan.expert_degree, dtype, self._fill)
        momentum = matrix_momentum_dtype(config.train, world.device)
        self.optimizer = RoleOptimizer(self.model, config.train, momentum, engine)
        self.guard = Guard(config.train.bad_steps)
        token_bytes = torch.from_numpy(self.tokenizer.byte_lengths)
        self.stepper = Stepper(
            self.model,
            self.optimizer,
            config.train,
            world,
            token_bytes,
            cuda_graph=config.run.cuda_graph,
            objective=self.job.objective(config),
        )
        self.evaluation = self.job.evaluation(config, self.loader, self.tokenizer, world, plan.micro_rows, self.display)

    def _fill(self, part_of: PartOf) -> None:
        """Give the model its first values."""
        materialize(self.model, self.config, self.tokenizer, self.world.device, part_of)
        take_weights(self._start.origin, self.model)

    def _branch(self, path: Path, meta: dict[str, Any]) -> None:
        """Take from another run's checkpoint all that goes over into a new run."""
        with taking_over(self.model):
            self._load(path, meta)
        try:
            self.loader.load_state_dict(meta["data"])
        except ValueError as error:
            self.display.say(f"the data is read from its beginning: {error}")

    def _restore(self, path: Path, meta: dict[str, Any]) -> None:
        try:
            self.loader.load_state_dict(meta["data"])
        except ValueError as error:
            start = f"--init {self.config.run.out} with another --out starts from its weights"
            raise ValueError(f"{error}; {start}") from error
        self._load(path, meta)
        self.guard.load_state_dict(meta["guard"])
        self.step = int(meta["step"])
        self._seconds_before = float(meta["seconds"])

    def _load(self, path: Path, meta: dict[str, Any]) -> None:
        """Load the tensors of a checkpoint."""
        saved, here = meta.get("fp8_sites", []), fp8_sites(self.model)
        note = compare_sites(saved, here)
        if note:
            self.display.say(note)
        tensors = self._tensors(with_scales=saved == here)
        if not has_sums(path):
            self.display.warn(f"{path} has no hashes, an earlier version saved it: it is loaded unchecked")
        self.checkpoints.load(path, tensors)
        self.optimizer.refresh()
        if self.model.fp8_scales is not None and saved:
            self.model.fp8_scales.restore()
        set_rng_state(tensors["rng"], self.world.device)

    def _open_logs(self, *, resumed: bool) -> None:
        config, out = self.config, self.config.run.out
        self.metrics = Metrics(out / METRICS, enabled=self.world.is_main)
        self._resources.callback(self.metrics.close)
        self.metrics.cut(self.step if resumed else -1)
        places = self.world.gather(place_of(self.world))
        self._slow = SlowRanks(places)
        self.meter = Meter(self.plan, self.world.device, self._seconds_before if resumed else 0.0)
        if not self.world.is_main:
            return
        write_config(out, self._record)
        record_start(self.metrics, self.plan, self.loader, self.step if resumed else None, places)
        self._sinks = open_sinks(config.run, self._record, self.step, self.display.say, self.display.warn)

    def __enter__(self) -> "Session":
        self.display.start(self.step)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.display.close()
        for sink in self._sinks:
            sink.close()
        if error is not None and self.world.size == 1:
            self.checkpoints.wait()  # finish writing a checkpoint that was begun before the error
        self._resources.close()

    def batches(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of this process, one list per remaining step."""
        world, rows = self.world, self.plan.micro_rows
        stream = self.loader.stream(
            rank=world.rank, world_size=world.size, micro_batch=rows, pin_memory=world.device.type == "cuda"
        )
        with contextlib.closing(stream):  # type: ignore[type-var]  # a generator
            while self.step < self.schedule.steps:
                with self.meter.waiting():
                    batches = [next(stream) for _ in range(self.loader.micro_batches(world.rank, world.size, rows))]
                yield batches

    def train_step(self, batches: list[Batch]) -> None:
        """Do one optimizer step and record it.

        Raises:
            BadStepError: too many steps in a row had a loss or gradient that isn't finite.
            OSError: the checkpoint in progress could not be written.
        """
        self.checkpoints.poll()
        lr = {kind: self.schedule.lr(self.step, peak) for kind, peak in self.optimizer.peak_lr.items()}
        phase = self.schedule.phase(self.step)
        result = self.stepper(batches, lr, self.config.train.bias_rate_at(self.step, self._start.steps_before))
        self.step += 1
        if result.bad is not None:
            self.metrics.write("bad_step", self.step, what=result.bad, tokens=self._tokens())
            self.display.warn(self.guard.bad(self.step, result.bad, self._samples_of_last_step()))
            self.meter.skip()
            return
        self.guard.good()
        values = self.meter.measure(self.step, result) | {"lr": lr["matrix"], "adam_lr": lr["vector"], "phase": phase}
        if self.guard.is_spike(result.loss):
            values["spike"] = True
            self.display.warn(f"step {self.step}: loss {result.loss:.3f} is a spike (6 sigma of the last 128 steps)")
        self._report_step(values, result.loads)

    def _report_step(self, values: dict[str, Any], loads: torch.Tensor) -> None:
        """Record a step; every `log_every` steps also record the expert load and print a line."""
        due = self.step % self.config.run.log_every == 0 or self.step in (1, self.schedule.steps)
        if due:
            values |= self.meter.summary(loads, self.schedule.steps - self.step)
        record = self.metrics.write("step", self.step, **values)
        self.display.advance(self.step)
        if due:
            self.display.step(record, self.schedule.steps)
            if slow := self._slow.warning(record.get("rank_seconds", [])):
                self.display.warn(slow)
            self._log({k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"})
            for sink in self._sinks if loads.numel() else ():
                sink.log_loads(self.step, loads.tolist())

    def lacks_evaluation(self) -> bool:
        """Return whether an evaluation is due now and not recorded: at the start, or after one that was cut short."""
        path = self.metrics.path
        done = (
            self.world.is_main
            and path.is_file()
            and any(record["event"] == "evaluation" and record["step"] == self.step for record in read_json_lines(path))
        )
        due = self.step == 0 or self.due(self.config.run.evaluate_every)
        return self.world.any(self.world.is_main and due and not done)

    def evaluate(self) -> None:
        """Make an evaluation; record, print and log what it finds."""
        with self.meter.paused():
            for finding in self.evaluation(self.model, self.step):
                self.metrics.write(finding.event, self.step, tokens=self._tokens(), **finding.values)
                for line in finding.lines:
                    self.display.say(line if line.startswith(" ") else f"step {self.step}: {line}")
                if finding.warning:
                    self.display.warn(finding.warning)
                self._log(finding.logged)
                for sink in self._sinks if finding.texts else ():
                    sink.log_samples(self.step, finding.texts)

    def _require_same_weights(self) -> None:
        if self.plan.parallel != "fsdp":
            require_same_weights(self.world, self.model, self.step, self.plan.expert_degree)

    def save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint, and record how long training stood still for it.

        Checkpoints are written one at a time: if the previous one isn't on disk yet, training waits for it, and a
        message says so.

        Args:
            wait: return only when the checkpoint is complete.

        Raises:
            OSError: it can't be written.
            ValueError: the weights of the processes differ.
        """
        began = time.perf_counter()
        with self.meter.paused():
            self._require_same_weights()
            meta = {
                "step": self.step,
                "config": self._record,
                "data": self.loader.state_dict(),
                "tokenizer": self.tokenizer.hash,
                "guard": self.guard.state_dict(),
                "fp8_sites": fp8_sites(self.model),
                "seconds": self.meter.seconds,
                "launch": self._launch,
            }
            files = {MODEL_FILE: self.tokenizer.model}  # so that a checkpoint can be used without the run's data
            waited = self.checkpoints.save(self.step, self._tensors(), meta, files)
            if waited > PATIENCE:
                self.display.say(
                    f"step {self.step}: waited {waited:.0f} s for the checkpoint before to be written: "
                    "a faster disk or a larger --checkpoint-every avoids that"
                )
            if wait:
                self.checkpoints.wait()
        self.metrics.write("checkpoint", self.step, seconds=time.perf_counter() - began, waited=waited)

    def finish(self) -> None:
        """Wait for the last checkpoint, then write the model folder and the report."""
        self.checkpoints.wait()
        out = self.config.run.out
        self.job.save_model(self.model, self.tokenizer, out / MODEL, self.world)
        if self.world.is_main:
            from yaongi.train.report.page import write_report

            report = write_report([out], benchmarks=self.config.run.benchmarks)
            self.display.say(f"model: {out / MODEL}\nreport: {report}")
            self._push()
        self.world.wait_without_limit()  # for the push

    def _push(self) -> None:
        """Push the model to the hub, if asked to; what goes wrong there is a warning."""
        out, name = self.config.run.out, self.config.run.push_to
        if name:
            try:
                self.display.say(f"pushed to {push_folder(out / MODEL, name, f'Open-Yaongi: {out}')}")
            except (ValueError, OSError) as error:
                again = shlex.join([*cli.words_for("yaongi.export"), str(out / MODEL), "--push-to", name])
                self.display.warn(f"{cli.one_line(error)}; again with: {again}")

    def due(self, every: int, step: int | None = None) -> bool:
        """Return whether something that happens every `every` steps, and after the last one, is due at `step`; now."""
        step = self.step if step is None else step
        return is_due(every, step, self.schedule.steps)

    def _tensors(self, *, with_scales: bool = True) -> dict[str, Any]:
        """Return the tensors of a checkpoint; a weight with a master copy is left out, for it is that copy's cast."""
        state, masters = self.optimizer.tensors(), self.optimizer.master_names()
        weights = {name: p.detach() for name, p in self.model.state_dict().items() if name not in masters}
        tensors = {"model": weights, "optimizer": state, "rng": rng_state(self.world.device)}
        scales = self.model.fp8_scales
        return tensors | ({"fp8": {"history": scales.history}} if scales is not None and with_scales else {})

    def _tokens(self) -> int:
        return self.step * self.config.train.batch_tokens

    def _samples_of_last_step(self) -> range:
        return range(self.loader.samples - self.config.train.batch_rows, self.loader.samples)

    def _log(self, values: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.log(self.step, values)
