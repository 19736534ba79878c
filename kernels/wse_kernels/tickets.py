"""Tickets: pieces of work that the threads at one job take as they come, so that one which began late delays nobody.

What a thread wrote before it took a ticket is there for whoever sees, by a ticket or by `tickets_taken`, that it was taken: threads that
take one for each piece that they have *finished* can so wait for each other.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import lower_builtin, type_callable
from numpy.typing import NDArray

_lower_builtin: Any = lower_builtin  # Numba's own annotations stop here


def new_tickets() -> NDArray[np.int64]:
    """Tickets of one job; the first is 0."""
    return np.zeros(1, np.int64)


def take_ticket(tickets: NDArray[np.int64]) -> int:
    """Next number: 0, 1, 2 ..., each given to one caller only, whichever threads they are."""
    number = int(tickets[0])
    tickets[0] = number + 1
    return number


def tickets_taken(tickets: NDArray[np.int64]) -> int:
    """Return how many were taken until now."""
    return int(tickets[0])


def pause() -> None:
    """Tell the processor that this thread looks again and again: what shares its core goes first."""


def _type_of_number(context: Any) -> Callable[..., Any]:
    return lambda tickets: types.int64


def _lower_take_ticket(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    counter = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "acq_rel")


def _lower_tickets_taken(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    counter = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.load_atomic(counter, "acquire", 8)


def _lower_pause(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    if platform.machine() in ("x86_64", "AMD64"):
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=ir.FunctionType(ir.VoidType(), ())), ())
    return context.get_dummy_value()


type_callable(pause)(lambda context: lambda: types.none)
_lower_builtin(pause)(_lower_pause)
for _number, _lower in ((take_ticket, _lower_take_ticket), (tickets_taken, _lower_tickets_taken)):
    type_callable(_number)(_type_of_number)
    _lower_builtin(_number, types.Array)(_lower)
