"""Records the launches of a call, so that another call with the same layout only repeats them.

A layout is the shape, strides, dtype, device and alignment of every tensor, and the value of every
other argument. Everything that an operator passes to its kernels follows from it, except addresses
and the tag of counters. csrc/torch/registration.h keeps one `Plan` for each layout.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Launch(NamedTuple):
    """`start` takes the arguments of a kernel, with addresses instead of tensors, and a stream."""

    start: Callable[..., None]
    args: tuple[Any, ...]
    tag: int | None
    constants: tuple[Any, ...]


class Plan(NamedTuple):
    """The bytes of scratch, and `repeat(stream, addresses)` for the addresses of the arguments that
    are tensors, of the results and of scratch, in this order."""

    scratch: int
    repeat: Callable[..., None]


class _State(threading.local):
    launches: list[Launch] | None = None
    tag: int | None = None


_state = _State()


def note_tag(tag: int) -> None:
    _state.tag = tag


def note(compiled: Any, grid: int, args: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
    if _state.launches is not None:
        _state.launches.append(Launch(compiled[(grid, 1, 1)], args, _state.tag, constants))


def record(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Plan | None]:
    """Call the function; return its answer and a plan to repeat the call, or None."""
    launches: list[Launch] = []
    # A hook of Triton, or the garbage collector, may call another operator meanwhile.
    before = _state.launches, _state.tag
    _state.launches, _state.tag = launches, None
    try:
        answer = function(*args)
    finally:
        _state.launches, _state.tag = before
    results = list(answer) if isinstance(answer, tuple) else [answer]
    return answer, _plan([x for x in args if isinstance(x, Tensor)], results, launches)


def _plan(inputs: list[Tensor], results: list[Tensor], launches: list[Launch]) -> Plan | None:
    if not launches or not all(x.is_contiguous() for x in results):
        return None
    known = [*inputs, *results]
    if len({id(x) for x in known}) < len(known):
        # One tensor as two arguments: which of them a kernel got is not known.
        return None
    launched = {id(arg) for launch in launches for arg in launch.args}
    if not all(id(x) in launched for x in results):
        # Something else computed a result.
        return None
    storages = {x.untyped_storage().data_ptr() for x in known}
    scratch = 0
    steps = []
    for launch in launches:
        # Kernels take addresses first, and the tag last.
        count = sum(isinstance(arg, Tensor) for arg in launch.args)
        tensors, rest = launch.args[:count], launch.args[count:]
        if not all(isinstance(arg, Tensor) for arg in tensors):
            return None
        tagged = bool(rest) and rest[-1] is launch.tag
        numbers = []
        for tensor in tensors:
            number = next((i for i, x in enumerate(known) if x is tensor), None)
            if number is None:
                if scratch or tensor.untyped_storage().data_ptr() in storages:
                    # A second scratch tensor, or a view of an argument or a result: its address is
                    # not known from theirs.
                    return None
                number = len(known)
                known.append(tensor)
                scratch = tensor.untyped_storage().nbytes()
            numbers.append(number)
        pick = operator.itemgetter(*numbers) if count > 1 else _picks_one(*numbers)
        steps.append((launch.start, pick, rest[:-1] if tagged else rest, tagged, launch.constants))
    return Plan(scratch, _repeat(steps))


def _picks_one(number: int) -> Callable[..., tuple[int, ...]]:
    return lambda addresses: (addresses[number],)


def _repeat(steps: list[Any]) -> Callable[..., None]:
    # Only here, because launch.py imports this module.
    from vispruner_kernels._triton.launch import draw_tag

    def repeat(stream: int, addresses: tuple[int, ...]) -> None:
        for start, pick, rest, tagged, constants in steps:
            if tagged:
                start(*pick(addresses), *rest, draw_tag(), *constants, stream=stream)
            else:
                start(*pick(addresses), *rest, *constants, stream=stream)

    return repeat
