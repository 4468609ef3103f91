"""Group I: numbers that go wrong on one of two ranks. Armed at DeepSpeed's engine, so bare DeepSpeed meets them too.

A step that is left out is left out on both: then the run is the one in which both ranks were struck, to the last bit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lab
import torch
from judge import RECOVERED, STUCK, WRONG, Case, Outcome, last_lines, started_again
from systems import STEPS, Bare, Megagpt, System
from torch import Tensor, nn

from megagpt.checkpoint.commit import committed
from megagpt.checkpoint.finite import not_finite_file
from megagpt.engine.build import Engine

BEGIN = 4  # the step that runs begin at; the first that is struck is the next
SPIKES = 'megagpt.guards.spikes={{"action": "{}", "window": 8, "sigma": 12}}'
Arm = Callable[[Path], None]  # in the rank that is struck; touches the file when it strikes


def in_forward(steps: tuple[int, ...], act: Callable[[Engine, Any], Any], fault_at: Path) -> None:
    """act(engine, output) gives the output of the engine in each of these steps, once."""
    original, left = Engine.forward, set(steps)

    def forward(engine: Engine, *args: Any, **options: Any) -> Any:
        output, step = original(engine, *args, **options), engine.global_steps + 1
        if not engine.module.training or step not in left:
            return output
        left.remove(step)
        fault_at.touch()
        return act(engine, output)

    Engine.forward = forward


def times(factor: float, *steps: int) -> Arm:
    return partial(in_forward, steps, lambda engine, output: output * factor)


def flipped(values: Tensor, bit: int) -> Tensor:
    """A copy in which one bit of the value that is largest has flipped."""
    copy = values.detach().clone()
    copy.view(-1).view(torch.int32)[copy.abs().argmax()] ^= 1 << bit
    return copy


def small_parameter(engine: Engine) -> nn.Parameter:
    """Which every rank has whole, at stage 3 too."""
    return list(engine.module.parameters())[-1]


def gradient_before_the_sum(bit: int) -> Arm:
    def act(engine: Engine, output: Any) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            handle.remove()
            return flipped(gradient, bit)

        handle = small_parameter(engine).register_hook(hook)
        return output

    return partial(in_forward, (BEGIN + 1,), act)


def in_step(act: Callable[[Engine], None], fault_at: Path, *, after: bool) -> None:
    """act(engine) before or after the update of the first step that is struck."""
    original = Engine.step

    def step(engine: Engine) -> None:
        struck = engine.global_steps == BEGIN
        if struck and not after:
            act(engine)
        original(engine)
        if struck and after:
            act(engine)
        if struck:
            fault_at.touch()

    Engine.step = step


def flip_gradient(engine: Engine) -> None:
    p = small_parameter(engine)
    p.grad.copy_(flipped(p.grad, 20))


def flip_weight(engine: Engine) -> None:
    p = small_parameter(engine)
    p.data.copy_(flipped(p, 20))  # of the mantissa: the lowest bits may be rounded away by the next update


SUMMED_GRADIENT: Arm = partial(in_step, flip_gradient, after=False)
WEIGHT: Arm = partial(in_step, flip_weight, after=True)


def struck_on(victims: str, arm: Arm, folder: Path) -> Callable[[int], None]:
    return lambda rank: arm(folder / "fault_at") if str(rank) in victims else None


# --- what is left out, on both ranks alike ----------------------------------------------------------------------------


def left_out(
    arm: Arm, options: tuple[str, ...], promised: str, victim: str, stage: int, system: System, folder: Path
) -> Outcome:
    both = _struck_on_both(arm, options, stage, system, folder)
    system.begin(folder / "run", stage, BEGIN)
    program = system.program(folder / "run", stage, STEPS, *options)
    ended = lab.launch(program, folder / "struck", arm=struck_on(victim, arm, folder / "struck"))
    if ended.hung or ended.code:
        return Outcome(STUCK, f"code {ended.code}: {last_lines(ended.text)}", seconds=ended.seconds)
    if difference := system.other_end(folder / "run", both, stage):
        return Outcome(WRONG, difference)
    if isinstance(system, Megagpt) and promised not in ended.text:
        return Outcome(RECOVERED, f"{promised!r} was not said")
    return Outcome(RECOVERED, lost=0)


def _struck_on_both(arm: Arm, options: tuple[str, ...], stage: int, system: System, folder: Path) -> Path:
    run_dir = folder / "both"
    system.begin(run_dir, stage, BEGIN)
    program = system.program(run_dir, stage, STEPS, *options)
    ended = lab.launch(program, folder / "struck both", arm=struck_on("01", arm, folder / "struck both"))
    assert ended.code == 0, ended.text
    return run_dir


# --- what ends the run, which then goes on without the fault as if nothing had been -----------------------------------


def stopped(
    arm: Arm, options: tuple[str, ...], promised: str, victim: str, stage: int, system: System, folder: Path
) -> Outcome:
    system.begin(folder / "run", stage, BEGIN)
    program = system.program(folder / "run", stage, STEPS, *options)
    died = lab.launch(program, folder / "dead", arm=struck_on(victim, arm, folder / "dead"))
    outcome = started_again(system, folder, stage, STEPS, died)
    if isinstance(system, Megagpt) and not outcome.note and (died.codes != [2, 2] or promised not in died.text):
        return Outcome(outcome.verdict, f"codes {died.codes}: {last_lines(died.text)}", outcome.lost, outcome.seconds)
    return outcome


# --- what breaks the weights: no step that is not finite is committed, and the message's own advice works -------------


def broken(arm: Arm | None, options: tuple[str, ...], victim: str, stage: int, system: System, folder: Path) -> Outcome:
    """The run ends on both ranks with a message; all that it committed is finite; the same command, without what broke
    it, resumes from the step that the message names, as if nothing had been.
    """
    system.begin(folder / "run", stage, BEGIN)
    program = system.program(folder / "run", stage, STEPS, *options)
    strike = struck_on(victim, arm, folder / "dead") if arm else lambda rank: None
    died = lab.launch(program, folder / "dead", arm=strike)
    if isinstance(system, Bare):
        return started_again(system, folder, stage, STEPS, died)
    steps = committed(folder / "run")
    if bad := [found for step_dir in steps if (found := not_finite_file(step_dir))]:
        return Outcome(WRONG, f"committed: {bad[0]}")
    named = f"it resumes from {steps[-1]}"
    note = "" if died.codes == [2, 2] and named in died.text else f"codes {died.codes}: {last_lines(died.text)}"
    outcome = started_again(system, folder, stage, STEPS, died, at_most=STEPS)  # steps that are not finite are no loss
    return Outcome(outcome.verdict, outcome.note or note, outcome.lost, outcome.seconds, outcome.orphans)


def break_weight(engine: Engine) -> None:
    """One value of the weights that this rank updates, whatever other ranks hold."""
    optimizer = engine.optimizer
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    held = next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), None)
    (held[0] if held else small_parameter(engine)).data.view(-1)[0] = float("nan")


BROKEN_WEIGHT: Arm = partial(in_step, break_weight, after=True)
WRONG_RATES = ("1e30", "1e6")  # seen in the weights; in the losses after them


def broken_weights() -> Iterator[Case]:
    for stage in range(4):
        for rate in WRONG_RATES:
            for save in (1, 2):
                name = f"learning rate {rate}, saved every {save}, stage {stage}"
                options = (f"optimizer.params.lr={rate}", f"megagpt.every.save={save}", "megagpt.schedule.max_steps=12")
                yield Case("I", name, partial(broken, None, options, "", stage))
        options = (f"optimizer.params.lr={WRONG_RATES[stage % 2]}", "megagpt.save_async=true", "megagpt.every.save=1")
        yield Case(
            "I", f"learning rate, saved beside training, stage {stage}", partial(broken, None, options, "", stage)
        )
        for victim in "01":
            run = partial(broken, BROKEN_WEIGHT, ("megagpt.every.save=1",), victim, stage)
            yield Case("I", f"a weight nan on {victim} before a save, stage {stage}", run, baseline=True)


def wrong_numbers() -> Iterator[Case]:
    yield from broken_weights()
    for stage in range(4):
        for victim in "01":
            for value in ("nan", "inf"):
                run = partial(left_out, times(float(value), BEGIN + 1), (), "its update was skipped", victim, stage)
                yield Case("I", f"output times {value} on {victim}, stage {stage}", run, baseline=True)
            run = partial(
                stopped,
                WEIGHT,
                ("megagpt.guards.compare_every=1",),
                "between ranks after step 5",
                victim,
                stage,
            )
            yield Case("I", f"weight's bit on {victim}, stage {stage}", run, baseline=True)
        victim = "01"[stage % 2]
        gradient = gradient_before_the_sum(30)  # of the exponent: an infinite norm, in stage 3's float64 a spike
        run = partial(left_out, gradient, (SPIKES.format("skip"),), "its update was skipped", victim, stage)
        yield Case("I", f"gradient's top bit on {victim}, stage {stage}", run, baseline=True)
        run = partial(
            stopped,
            times(float("nan"), BEGIN + 1, BEGIN + 2),
            ("megagpt.guards.max_bad_steps=2",),
            f"the loss is nan at step {BEGIN + 2} on rank {victim}: 2 steps in a row were not finite",
            victim,
            stage,
        )
        yield Case("I", f"output times nan twice on {victim}, stage {stage}", run)
        for action, judged in (("skip", left_out), ("roll back", left_out), ("stop", stopped)):
            run = partial(judged, times(30.0, BEGIN + 3), (SPIKES.format(action),), "spike at step 7", victim, stage)
            yield Case("I", f"spike on {victim}, {action}, stage {stage}", run)
    for victim in "01":
        for name, arm in (("weight's", WEIGHT), ("summed gradient's", SUMMED_GRADIENT)):
            run = partial(
                stopped,
                arm,
                ("megagpt.guards.compare_every=3",),
                "between ranks after step 6",
                victim,
                0,
            )
            yield Case("I", f"{name} bit on {victim}, compared a step later, stage 0", run, baseline=True)


def blind_spots() -> Iterator[Case]:
    """Where the guards end: all ranks agree on a sum that has a wrong addend, and no norm is far off."""
    for stage in range(4):
        run = partial(stopped, gradient_before_the_sum(20), ("megagpt.guards.compare_every=1",), "", "1", stage)
        yield Case("I", f"gradient's low bit before the sum, stage {stage}: a blind spot", run, baseline=True)
