"""What a plan says: where everything lies, what a step moves and takes, what the drives wear, what it costs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.filesize import decimal

from megatrain_io.errors import DoesNotFitError
from megatrain_io.paging.device.pool import DeviceKind, VramPlan
from megatrain_io.planning.ram_budget import RamPlan

__all__ = ["Plan", "Prices", "Problem", "StepTime", "Variant", "Wear"]

_HOUR = 3600.0
_TOKENS_SHOWN = 1e9
_SHOWN = 0.005
"""Share of a step below which a wait would be shown as nothing."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step in the steady state, as the simulator finds them.

    Attributes:
        seconds: of the whole step.
        phases: seconds by phase of the step; they add up to ``seconds``.
        waits: seconds that computing waits, by cause: ``read``, ``pool``, ``update``, ``write``.
        compute: seconds that computing takes by itself, when it never waits.
        is_measured: whether ``compute`` was measured on this machine, on two blocks; else it is worked out from FLOPs.
    """

    seconds: float
    phases: Mapping[str, float]
    waits: Mapping[str, float]
    compute: float
    is_measured: bool


@dataclass(frozen=True)
class Variant:
    """What one change of the settings or of the machine would do to a step.

    Attributes:
        change: what is changed, in words.
        seconds: of a step with it, in the steady state; None where the machine's rates are not known.
        read_bytes: read in a step with it, averaged between two commits.
        written_bytes: written in a step with it, averaged between two commits.
    """

    change: str
    seconds: float | None
    read_bytes: float
    written_bytes: float


@dataclass(frozen=True)
class Problem:
    """Why a run does not fit, and the nearest settings that do.

    Attributes:
        reason: what is too small, with the numbers.
        nearest: ``key=value`` of each setting to change; empty where no change helps.
    """

    reason: str
    nearest: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The reason, and the nearest settings that fit, in one sentence or two."""
        nearest = f". The nearest that fits: {' '.join(self.nearest)}" if self.nearest else ""
        return f"{self.reason}{nearest}"


@dataclass(frozen=True)
class Wear:
    """What a run writes, against what the drives are rated for, in TB (10^12 bytes).

    Attributes:
        written_tb: that the run writes, to all drives together.
        rated_tb: that all drives together are rated for; None where neither ratings nor sizes are known.
        is_typical: whether ``rated_tb`` is typical of drives of this size, and not their own figure.
        used_tb: that was written to the drives before, where they report it.
    """

    written_tb: float
    rated_tb: float | None
    is_typical: bool
    used_tb: float | None


@dataclass(frozen=True)
class Prices:
    """What costs are worked out from, in any one currency; None where a figure is not known.

    Attributes:
        watts: power that the machine takes while it trains.
        kilowatt_hour: price of a kWh of electricity.
        rented_hour: price of an hour of a rented GPU, to compare with.
    """

    watts: float | None = None
    kilowatt_hour: float | None = None
    rented_hour: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a run needs and does, known before it begins.

    Bytes and seconds of a step are those of the steady state, averaged between two commits.

    Attributes:
        model: ``model_type`` of its configuration.
        parameters: number of parameters of the model.
        active_parameters: number of parameters that a token meets: fewer in a mixture of experts.
        machine: name of the machine that the plan is for.
        settings: keys of the configuration that decide the figures, with their values.
        tokens_per_step: tokens that go through the model in a step, padding included.
        steps: optimizer steps of the run; None where their number is not known.
        memory: how RAM is divided; None where it does not fit.
        ledger_bytes: the most RAM that the package itself holds; None where it does not fit.
        process_bytes: the most RAM that the process takes, libraries included; None where that is not known.
        store_bytes: bytes of the store on all drives.
        scratch_bytes: bytes on the drives besides, while the run goes on: activation checkpoints, deferred gradients.
        vram: how the memory of a GPU is divided; None without one, or where it does not fit.
        vram_bytes: the least memory of a GPU that a step can be done in; None without one.
        phases: (bytes read, bytes written) by phase of a step.
        committing_bytes: the most that a step writes: one that commits, and that takes its speculative updates back.
        updates_wait: whether a step's update is made by the next step.
        time: seconds of a step; None where the machine's rates are not known.
        tokens_to_hide_io: tokens of a step from which on computing takes longer than moving bytes.
        variants: what single changes would do to a step.
        wear: what the run writes to the drives; None where the number of steps is not known.
        prices: what costs are worked out from.
        problems: why it does not fit; empty where it does.
        notes: sentences about what else should be known.
        carried_bytes: bytes that the run folder takes for tensors that are not trained, and only carried to an export.
    """

    model: str
    parameters: int
    active_parameters: int
    machine: str
    settings: Mapping[str, Any]
    tokens_per_step: int
    steps: int | None
    memory: RamPlan | None
    ledger_bytes: int | None
    process_bytes: int | None
    store_bytes: int
    scratch_bytes: int
    vram: VramPlan | None
    vram_bytes: int | None
    phases: Mapping[str, tuple[float, float]]
    committing_bytes: int
    updates_wait: bool
    time: StepTime | None
    tokens_to_hide_io: int | None
    variants: tuple[Variant, ...]
    wear: Wear | None
    prices: Prices
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    carried_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the run fits the machine, and so can be begun."""
        return not self.problems

    @property
    def read_bytes(self) -> float:
        """Bytes read in a step, in the steady state, averaged between two commits."""
        return sum(read for read, _ in self.phases.values())

    @property
    def written_bytes(self) -> float:
        """Bytes written in a step, in the steady state, averaged between two commits."""
        return sum(written for _, written in self.phases.values())

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that go through the model per second, in the steady state; None where no time is known."""
        return None if self.time is None else self.tokens_per_step / self.time.seconds

    @property
    def hours(self) -> float | None:
        """Hours that the whole run takes; None where the number of steps or the time of one is not known."""
        return None if self.time is None or self.steps is None else self.steps * self.time.seconds / _HOUR

    def require_fits(self) -> "Plan":
        """Return this plan, if the run fits.

        Raises:
            DoesNotFitError: it does not; the message has the numbers, and the nearest settings that fit.
        """
        if self.problems:
            raise DoesNotFitError("; ".join(map(str, self.problems)))
        return self

    def summary(self) -> Iterator[str]:
        """Yield what is said at the beginning of a run: a line for VRAM, for RAM and for a step, and the notes."""
        yield from (str(budget) for budget in (self.vram, self.memory) if budget is not None)
        moved = (
            f"{decimal(round(self.read_bytes))} read and {decimal(round(self.written_bytes))} written a step"
        )
        seconds = "" if self.time is None else f" in {_seconds(self.time.seconds)}"
        total = "" if self.hours is None else f"; {_hours(self.hours)} in all"
        yield f"plan: {moved}{seconds}{total}"
        yield from self.notes

    def as_dict(self) -> dict[str, Any]:
        """All figures of the plan as plain types that JSON has."""
        figures = asdict(replace(self, memory=None, vram=None))
        if self.vram is not None:
            pool = self.vram.pool
            buffers = {"weights": _by_name(pool.weights), "gradients": _by_name(pool.gradients)}
            figures["vram"] = asdict(self.vram) | {"pool": buffers, "total": self.vram.total}
        if self.memory is not None:
            memory = self.memory
            figures["memory"] = {
                "ram": memory.ram,
                "total": memory.total,
                "buffers": memory.pool_nbytes,
                "activations": memory.activations,
                "compute": memory.needs.compute + memory.needs.heap,
                "tables": memory.needs.tables,
                "gradients": memory.deferred_nbytes,
                "residents": memory.resident_nbytes,
            }
        return figures | {
            "fits": self.fits,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
        }

    def __str__(self) -> str:
        """The plan as text for a person, a line for each fact."""
        rows = [("model", self._model_text()), ("machine", self.machine)]
        rows += [("does not fit", str(problem)) for problem in self.problems] or [("fits", "yes")]
        scratch = "" if self.memory is None else f", while it runs {decimal(self.scratch_bytes)} more"
        carried = f", carried tensors {decimal(self.carried_bytes)}" if self.carried_bytes else ""
        rows.append(("drive", f"store {decimal(self.store_bytes)}{carried}{scratch}"))
        if self.memory is not None:
            rows.append(("RAM", str(self.memory).removeprefix("RAM: ")))
        if self.process_bytes is not None:
            rows.append(("", f"the whole process {decimal(self.process_bytes)}"))
        if self.vram_bytes is not None:
            rows.append(("VRAM", f"{decimal(self.vram_bytes)} at least"))
        if self.vram is not None:
            rows.append(("", str(self.vram).removeprefix("VRAM: ")))
        step = () if self.memory is None else (*self._step_rows(), *self._variant_rows())
        rows += [*step, *self._run_rows()]
        rows += [("note", note) for note in self.notes]
        return "\n".join(f"{name:<14} {text}".rstrip() for name, text in rows)

    def _model_text(self) -> str:
        active = (
            "" if self.active_parameters == self.parameters else f", {_count(self.active_parameters)} active"
        )
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        return f"{self.model}, {_count(self.parameters)} parameters{active}; {settings}"

    def _step_rows(self) -> Iterator[tuple[str, str]]:
        moved = f"{decimal(round(self.read_bytes))} read, {decimal(round(self.written_bytes))} written"
        if self.time is None:
            yield "step", f"{self.tokens_per_step:,} tokens: {moved}"
        else:
            time = self.time
            how = "measured on two blocks" if time.is_measured else "from FLOPs"
            yield "step", f"{self.tokens_per_step:,} tokens in {_seconds(time.seconds)}: {moved}"
            yield (
                "",
                f"{self.tokens_per_second:,.1f} tokens/s; computing alone {_seconds(time.compute)} ({how})",
            )
            waits = [
                f"{cause} {_seconds(s)}" for cause, s in time.waits.items() if s >= _SHOWN * time.seconds
            ]
            yield "", f"computing waits for: {', '.join(waits)}" if waits else "computing never waits"
        for phase, (read, written) in self.phases.items():
            seconds = "" if self.time is None else f"{_seconds(self.time.phases.get(phase, 0.0))}, "
            yield "", f"  {phase}: {seconds}{decimal(round(read))} read, {decimal(round(written))} written"
        if self.tokens_to_hide_io is not None:
            yield (
                "",
                f"from {self.tokens_to_hide_io:,} tokens a step on, computing takes longer than moving bytes",
            )

    def _variant_rows(self) -> Iterator[tuple[str, str]]:
        for variant in self.variants:
            seconds = ""
            if variant.seconds is not None and self.time is not None:
                seconds = (
                    f"{_seconds(variant.seconds)} a step ({variant.seconds / self.time.seconds:.2f} times), "
                )
            moved = (
                f"{decimal(round(variant.read_bytes))} read, {decimal(round(variant.written_bytes))} written"
            )
            yield "if", f"{variant.change}: {seconds}{moved}"

    def _run_rows(self) -> Iterator[tuple[str, str]]:
        if self.steps is None:
            if self.tokens_per_second is not None:
                steps = _TOKENS_SHOWN / self.tokens_per_step
                hours = _TOKENS_SHOWN / self.tokens_per_second / _HOUR
                written = decimal(round(steps * self.written_bytes))
                yield (
                    "10^9 tokens",
                    f"{_hours(hours)}, {written} written (give max_steps or --tokens for a run)",
                )
            return
        run_hours = self.hours
        takes = "" if run_hours is None else f": {_hours(run_hours)}"
        yield "run", f"{self.steps:,} steps, {self.steps * self.tokens_per_step:,} tokens{takes}"
        if self.wear is not None:
            yield "wear", _wear_text(self.wear)
        prices = self.prices
        if run_hours is not None and prices.watts is not None:
            energy = run_hours * prices.watts / 1e3
            price = prices.kilowatt_hour
            cost = "" if price is None else f", {energy * price:,.2f} at the given price"
            yield "electricity", f"{_figure(energy)} kWh at {prices.watts:,.0f} W{cost}"
        if run_hours is not None and prices.rented_hour is not None:
            yield "rented GPU", f"{run_hours * prices.rented_hour:,.2f} at the given price, for as many hours"


def _wear_text(wear: Wear) -> str:
    text = f"{_figure(wear.written_tb)} TB written"
    if wear.rated_tb is None:
        return text
    typical = " (typical of drives of this size, not their own figure)" if wear.is_typical else ""
    used = "" if wear.used_tb is None else f"; {wear.used_tb / wear.rated_tb:.1%} were written before"
    share = (
        f"{wear.written_tb / wear.rated_tb:.1%} of the {wear.rated_tb:,.0f} TB that the drives are rated for"
    )
    return f"{text}, {share}{typical}{used}"


def _count(parameters: int) -> str:
    if parameters >= 1e9:  # noqa: PLR2004 - a unit
        return f"{parameters / 1e9:.2f} B"
    return f"{parameters / 1e6:.1f} M"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.1f} s"  # noqa: PLR2004 - three digits or four


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"  # noqa: PLR2004 - three digits


def _hours(hours: float) -> str:
    minutes, days = 2, 48
    if hours < minutes:
        return f"{60 * hours:,.1f} minutes"
    return f"{hours:,.1f} hours" if hours < days else f"{hours / 24:,.1f} days"


def _by_name(kinds: Mapping[DeviceKind, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Kinds of buffers by what they are for, with the format where there are several for the same."""
    stops = [kind.stop for kind in kinds]
    return {
        kind.stop if stops.count(kind.stop) == 1 else f"{kind.stop} {kind.format}": size
        for kind, size in kinds.items()
    }
