"""A sampler that stays: rows come one by one, and each is answered once its picture is on disk.

The way of a row, from the line that a program writes to the line that it reads:

    line        read ahead in a thread of its own                          sampling/inbox.py
    request     parsed, checked against the model and the folder           config/rows.py, sampling/rows.py
    batch       with others of its kind, those that wait; padded           as every batch, so that pictures are equal
    picture     denoised, decoded                                          sampling/loop.py
    planned     its line goes into items.jsonl                             outputs/open_plan.py
    saved       writer threads: PNG, then sidecar, then the answer         outputs/writer.py, sampling/row_product.py

What is wrong with a row is its answer, and ends nothing. Kept are the rows that wait and, of all others, hashes.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ddim_cli.config.job_file import JobFile, folded, job_of, name_of
from ddim_cli.config.rows import Row, RowError, json_object, row_of
from ddim_cli.errors import DdimError, InterruptedRunError, UsageError
from ddim_cli.interrupts import LONGEST_SLEEP, interrupted_again, uninterrupted
from ddim_cli.models.device import choose_device, choose_dtype
from ddim_cli.outputs.files import File, version_of
from ddim_cli.outputs.open_plan import Hashes, OpenPlan, opened
from ddim_cli.outputs.store import read_json, sidecar_of
from ddim_cli.outputs.writer import BackgroundWriter, not_written
from ddim_cli.sampling.executor import Summary, load
from ddim_cli.sampling.inbox import LONGEST_LINE, Inbox, Line
from ddim_cli.sampling.init import Init, read_init
from ddim_cli.sampling.items import Item, Kind, Shape
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.loop import Denoiser, Picture, run_batches
from ddim_cli.sampling.network import Networks
from ddim_cli.sampling.precision import choose_batch_size, tf32
from ddim_cli.sampling.product import item_identity
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run
from ddim_cli.sampling.row_product import RowPictures, line_of
from ddim_cli.sampling.rows import items_of, nothing_to_lead_away_from, run_of_rows

# With `sampling.batch_size = "auto"`. A batch is padded, so that a row alone takes as long as a whole one: on a CPU, of
# the bundled model, one of four takes twice as long as one of one, and an image of it half as long; more gain nothing.
ON_CPU, ON_GPU = 4, 16
# Rows that wait for others of their kind, in batches: then the one that came first is not kept waiting any more.
MOST_WAITING = 4
# Pictures to begin from that are not read again for the rows that follow.
KEPT_INITS = 16
# Seconds that a row waits for others, unless somebody says.
WAITS = 0.1
ID = "id"

# Is given an answer. Raises `UnheardError` if whoever asks has gone.
Tell = Callable[[Mapping[str, Any]], None]


class UnheardError(Exception):
    """Nobody reads the answers any more."""


@dataclass(frozen=True)
class Source:
    """Where rows come from: a ``stream`` of JSON lines, which messages call ``label``.

    Paths in rows lead from ``folder``; ``stem`` is what the output folder is named after.
    """

    stream: BinaryIO
    label: str = "stdin"
    stem: str = "items"
    folder: Path = Path()


@dataclass(frozen=True)
class Request:
    """A row that can be sampled. ``says`` is what its answer begins with; it ``came`` at that time."""

    item: Item
    says: Mapping[str, Any]
    came: float


class RefusedError(Exception):
    """What is wrong with a row, in a sentence; ``says`` is what its answer begins with."""

    def __init__(self, says: Mapping[str, Any], text: str):
        super().__init__(text)
        self.says = says


@dataclass(frozen=True)
class Served:
    """What a run did: its ``summary``, and how many rows were answered with an error (``refused``)."""

    summary: Summary
    refused: int


@dataclass
class RowReader:
    """From lines to requests, each checked by itself. ``run`` is one that knows of no rows yet."""

    run: Run
    folder: Path
    warn: Callable[[str], None]
    _inits: OrderedDict[tuple[Any, ...], Init] = field(default_factory=OrderedDict, init=False)
    _has_warned: bool = field(default=False, init=False)

    def request(self, line: Line, number: int) -> Request:
        """The request in a line, which is row ``number``. Raises RefusedError."""
        says: dict[str, Any] = {"row": number}
        try:
            values = _values(line)
            if ID in values:
                says[ID] = _id(values.pop(ID))
            if isinstance(values.get("name"), str):
                says["name"] = values["name"]
            row = row_of(values)
            says["name"] = name_of(row, number)
            return Request(self._item(row, values, number), says, line.came)
        except (RowError, UsageError) as error:
            raise RefusedError(says, str(error)) from None
        except OSError as error:
            raise RefusedError(says, f"{error.filename}: {error.strerror}") from None
        except RecursionError:
            raise RefusedError(says, "not valid JSON: too many lists in lists") from None

    def _item(self, row: Row, values: Mapping[str, Any], number: int) -> Item:
        """Raises UsageError."""
        file = job_of([values], self.folder)
        try:
            items = items_of(file, self.run, read=self._read_init)
        except UsageError as error:
            # The row's place in a file of its own says nothing.
            raise UsageError(str(error).removeprefix(f"{file.where(0)}: ")) from None
        self._warn(file, number)
        return items.item(row, number, f"row {number}")

    def _warn(self, file: JobFile, number: int) -> None:
        for text in nothing_to_lead_away_from(file, self.run.config.sampling.guidance_scale):
            if not self._has_warned:
                self._has_warned = True
                self.warn(f"row {number}: {text.removeprefix(f'{file.where(0)}: ')}")

    def _read_init(
        self,
        timesteps: Sequence[int],
        shape: Shape,
        picture: Path,
        mask: Path | None = None,
        strength: float | None = None,
        order: int = 1,
    ) -> Init:
        """As `read_init`, once for rows that begin alike for as long as the files stay what they are."""
        key = (picture, mask, strength, version_of(picture), None if mask is None else version_of(mask))
        if key not in self._inits:
            self._inits[key] = read_init(timesteps, shape, picture, mask, strength, order)
            if len(self._inits) > KEPT_INITS:
                self._inits.popitem(last=False)
        return self._inits[key]


def _values(line: Line) -> dict[str, Any]:
    """Raises RowError."""
    if line.data is None:
        raise RowError(f"is longer than {LONGEST_LINE:,} bytes")
    try:
        return json_object(line.data.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None


def _id(value: Any) -> Any:
    """Raises RowError for what cannot be said again."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise RowError(f"{ID} holds a number that is not finite, or too many lists in lists") from None
    return value


class Answers:
    """Tells answers, from whichever thread has one, and counts them; knows for which names one is to come."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._changed = threading.Condition()
        self._to_come: set[str] = set()
        self.made = self.present = self.refused = 0

    def expect(self, name: str) -> None:
        """A picture of this name is being made."""
        with uninterrupted(), self._changed:
            self._to_come.add(folded(name))

    def awaits(self, name: str) -> bool:
        """Whether one of this name is, or of one that some file systems take for it."""
        with uninterrupted(), self._changed:
            return folded(name) in self._to_come

    def settle(self, name: str) -> None:
        """It is made, or never will be."""
        with uninterrupted(), self._changed:
            self._to_come.discard(folded(name))
            self._changed.notify_all()

    def wait(self, check: Callable[[], None]) -> None:
        """Wait until none is being made. ``check`` raises where that would be for ever."""
        while True:
            with uninterrupted(), self._changed:
                if self._to_come:
                    self._changed.wait(LONGEST_SLEEP)
                if not self._to_come:
                    return
            check()

    def refuse(self, says: Mapping[str, Any], text: str) -> None:
        """Answer with what is wrong. Raises UnheardError."""
        with uninterrupted(), self._changed:
            self.refused += 1
            with interrupted_again():
                self._tell({**says, "error": text.replace("\n", "; ")})

    def give(self, request: Request, path: File, sidecar: Mapping[str, Any], present: bool) -> None:
        """Answer with a picture and its sidecar, which are on disk. Raises UnheardError."""
        facts = {
            "seed": sidecar["seed"],
            "file": str(path),
            "present": present,
            "pixels_sha256": sidecar["image"]["pixels_sha256"],
            "seconds": sidecar["timing"]["seconds"],
            "record": sidecar,
        }
        with uninterrupted(), self._changed:
            self.made, self.present = self.made + (not present), self.present + present
            with interrupted_again():
                self._tell({**request.says, **facts})


class Resident:
    """Answers the rows of an ``inbox``. All but the saving runs in one thread.

    ``waits`` is for how many seconds a row may wait for others. With ``overwrite``, pictures of
    runs before are replaced.
    """

    def __init__(
        self,
        job: Job,
        reader: RowReader,
        denoiser: Denoiser,
        answers: Answers,
        reporter: Reporter,
        waits: float,
        overwrite: bool,
    ):
        self._job, self._reader, self._denoiser = job, reader, denoiser
        self._answers, self._reporter, self._waits = answers, reporter, waits
        self._batch_size = job.batch_size
        self._waiting: dict[Kind, list[Request]] = {}
        self._count = 0
        # A row of a name of which a picture is being made: it is looked at when that is done.
        self._held: Request | None = None
        # Of which names there are pictures of this run, where others are replaced.
        self._own = Hashes() if overwrite else None
        self.seconds = 0.0

    def run(self, inbox: Inbox, plan: OpenPlan, writer: BackgroundWriter) -> None:
        """Answer all rows; ``seconds`` is then for how long there was something to do.

        Raises:
            RunError: where rows cannot be read, or pictures not be written.
            UnheardError: if nobody reads the answers any more.
        """
        self._inbox, self._plan, self._writer = inbox, plan, writer
        for batch in iter(self._next_batch, []):
            started = time.perf_counter()
            self._make(batch)
            self.seconds += time.perf_counter() - started
        started = time.perf_counter()
        self._answers.wait(writer.check)
        self.seconds += time.perf_counter() - started

    def _next_batch(self) -> list[Request]:
        """The rows to make next: a whole batch, or those that have waited long enough. None at the end."""
        while True:
            self._writer.check()
            if self._is_full() or (self._waiting and self._held is not None):
                return self._taken()
            if self._held is not None:
                self._look_again(self._held)
            elif (line := self._inbox.take(self._deadline())) is not None:
                self._admit(line)
            elif self._waiting and (self._inbox.ended or self._is_time()):
                return self._taken()
            elif self._inbox.ended:
                return []

    def _is_full(self) -> bool:
        """Whether there is a whole batch, or there are so many of several kinds that none is to be read any more."""
        counts = [len(rows) for rows in self._waiting.values()]
        return max(counts, default=0) >= self._batch_size or sum(counts) >= MOST_WAITING * self._batch_size

    def _oldest(self) -> list[Request]:
        """The rows of the kind of the one that has waited longest."""
        return min(self._waiting.values(), key=lambda rows: rows[0].came)

    def _deadline(self) -> float | None:
        """Until when the one that came first may wait."""
        return self._oldest()[0].came + self._waits if self._waiting else None

    def _is_time(self) -> bool:
        deadline = self._deadline()
        return deadline is not None and time.monotonic() >= deadline

    def _taken(self) -> list[Request]:
        """A batch of rows that wait no longer: with the oldest, unless it has time and others make a whole batch."""
        rows = self._oldest()
        if not self._is_time():
            rows = next((each for each in self._waiting.values() if len(each) >= self._batch_size), rows)
        batch, rest = rows[: self._batch_size], rows[self._batch_size :]
        del self._waiting[batch[0].item.kind]
        if rest:
            self._waiting[batch[0].item.kind] = rest
        return batch

    def _admit(self, line: Line) -> None:
        number, self._count = self._count, self._count + 1
        with self._refusing():
            request = self._reader.request(line, number)
            if self._answers.awaits(request.item.name):
                self._held = request
            else:
                self._place(request)

    def _look_again(self, held: Request) -> None:
        """At a row that was held back, once nothing is being made."""
        self._answers.wait(self._writer.check)
        self._held = None
        with self._refusing():
            self._place(held)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except RefusedError as refused:
            self._answers.refuse(refused.says, str(refused))

    def _place(self, request: Request) -> None:
        """Answer with the picture that is there, or have the row wait for a batch. Raises RefusedError."""
        name, folder = request.item.name, self._job.folder
        if self._own is not None and name not in self._own:
            self._own.add(name)
            with self._writing():
                folder.remove(name)
        sidecar = self._found(request)
        if sidecar is None:
            self._check_case(request)
            self._answers.expect(name)
            self._waiting.setdefault(request.item.kind, []).append(request)
            return
        if not self._plan.has(name):
            with self._writing():
                self._plan.add([line_of(request.item, self._job)])
        self._answers.give(request, folder.picture(name), sidecar, present=True)

    def _found(self, request: Request) -> dict[str, Any] | None:
        """The sidecar of a row whose pair is on disk. Raises RefusedError for one of other settings."""
        name, folder = request.item.name, self._job.folder
        path, settings = folder.sidecar(name), item_identity(self._job, request.item)
        sidecar = read_json(path)
        if sidecar is None:
            return None
        difference = folder.apart(sidecar, settings)
        if difference is not None:
            raise RefusedError(
                request.says, f"the name {name!r} is taken: {path} {difference}; give the row another name"
            )
        return sidecar if folder.is_pair(path, settings) else None

    def _check_case(self, request: Request) -> None:
        """Raises RefusedError for a name that some file systems take for that of another row."""
        name = request.item.name
        other = self._plan.find(name) if self._plan.has(name) else None
        if other is not None and other["name"] != name:
            raise RefusedError(
                request.says, f"the name {name!r} is taken but for the case of its letters: {other['name']!r}"
            )

    def _make(self, batch: Sequence[Request]) -> None:
        """Sample rows of one kind, and hand them to the writers.

        Where that fails each half is tried alone, and so on: what is wrong is of single rows, and so is the answer.
        """
        try:
            pictures = self._pictures([request.item for request in batch])
        except DdimError as error:
            # Not of the rows, if it is the disk.
            self._writer.check()
            if len(batch) > 1:
                middle = len(batch) // 2
                self._make(batch[:middle])
                self._make(batch[middle:])
                return
            self._answers.settle(batch[0].item.name)
            self._answers.refuse(batch[0].says, str(error))
            return
        with self._writing():
            self._plan.add([line_of(request.item, self._job) for request in batch])
        for request, picture in zip(batch, pictures, strict=True):
            self._writer.submit(self._save, request, picture)
        self._reporter.batch(len(batch))

    def _pictures(self, items: Sequence[Item]) -> list[Picture]:
        """Raises RunError for a result that is not finite, UsageError for a file that is no longer what it was."""

        def on_step(done: int) -> None:
            self._writer.check()
            self._reporter.step(done)

        batches = run_batches(self._denoiser, items, self._batch_size, on_step, self._halved)
        return [picture for pictures in batches for picture in pictures]

    def _halved(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._reporter.halved(batch_size)

    def _save(self, request: Request, picture: Picture) -> None:
        """Write a picture, then answer; called in a writer thread. Raises OSError, and UnheardError."""
        name, folder = request.item.name, self._job.folder
        try:
            RowPictures().save(self._job, picture)
        except UsageError as error:
            # Another process has made another picture of this name meanwhile.
            self._answers.settle(name)
            self._answers.refuse(request.says, str(error))
            return
        path = folder.picture(name)
        sidecar = json.loads(sidecar_of(path).read_bytes())
        self._answers.settle(name)
        self._answers.give(request, path, sidecar, present=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises RunError in place of OSError."""
        try:
            yield
        except OSError as error:
            raise not_written(error, self._job.folder.path) from None


def serve(
    run: Run,
    source: Source,
    tell: Tell,
    waits: float = WAITS,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Served:
    """Sample rows as they come, until the source ends. ``run`` was resolved without knowing of them.

    Each is answered, in the order in which they are done, by a call of ``tell``: ``row`` is its number, from 0, then
    come its ``id``, if it has one, and its ``name``; then ``seed``, ``file``, ``present`` (whether it was there
    already), ``pixels_sha256``, ``seconds`` (its share of its batch) and ``record`` (the sidecar), or ``error``.
    ``waits`` is for how many seconds a row waits until its batch is whole. With ``overwrite`` pictures that are there
    are made anew, of a name once.

    Raises:
        UsageError: for a folder that cannot be used, or holds pictures of other settings.
        ModelError: for weights that cannot be loaded.
        RunError: where rows cannot be read, or pictures not be written; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
        UnheardError: from ``tell``; likewise.
    """
    reporter = reporter or Reporter()
    reader = RowReader(_with_batch_size(run), source.folder, reporter.warn)
    job = make_job(run_of_rows(reader.run), [], ending=f"-{source.stem}", pads=True)
    if not overwrite:
        job.folder.check_settings(job.identity)
    job.folder.check_writable()
    with tf32(run.config.runtime.tf32):
        product = RowPictures()
        # How many images there will be, nobody knows: code that is kept is taken, and none is built for it.
        job, denoiser = load(job, product, 1, Networks(), reporter)
        job.folder.create()
        if overwrite:
            job.folder.clear((), job.identity)
        answers = Answers(tell)
        resident = Resident(job, reader, denoiser, answers, reporter, waits, overwrite)
        with opened(job.folder, job.record) as plan:
            reporter.started(job, product, 0)
            try:
                _run(resident, Inbox(source.stream, source.label), plan, job, answers, reporter)
                left = plan.close(answers.made, resident.seconds, job.run.config.output.grid)
            except OSError as error:
                raise not_written(error, job.folder.path) from None
            finally:
                reporter.stopped()
    sheet = job.folder.grid if job.run.config.output.grid and job.folder.grid.exists() else None
    return Served(
        Summary(answers.made, answers.present, resident.seconds, job.folder.path, sheet, left), answers.refused
    )


def _run(resident: Resident, inbox: Inbox, plan: OpenPlan, job: Job, answers: Answers, reporter: Reporter) -> None:
    """Answer all rows. On Ctrl-C, what was denoised is still written and answered."""
    interrupted = False
    with BackgroundWriter(job.folder.path, inbox.wake) as writer:
        try:
            resident.run(inbox, plan, writer)
        except KeyboardInterrupt:
            reporter.stopped()
            reporter.interrupted()
            interrupted = True
    if interrupted:
        raise InterruptedRunError(
            f"interrupted: {answers.made} images were made and are in {job.folder.path}; the same rows, sent again, go "
            "on from there"
        )


def _with_batch_size(run: Run) -> Run:
    """The run with a number in place of ``auto``: rows that come one by one make no plan to choose it from."""
    settings, runtime = run.config.sampling, run.config.runtime
    if settings.batch_size != "auto":
        return run
    device = choose_device(runtime.device)
    most = ON_CPU if device.type == "cpu" else ON_GPU
    size = choose_batch_size("auto", most, run.model, device, choose_dtype(runtime.dtype, device))
    config = run.config.model_copy(update={"sampling": settings.model_copy(update={"batch_size": size})})
    return replace(run, resolved=replace(run.resolved, config=config))
