"""Tickets: pieces of work that the threads at one job take as they come, so that one which began late delays nobody."""

from __future__ import annotations

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


def _type_take_ticket(context: Any) -> Callable[..., Any]:
    return lambda tickets: types.int64


def _lower_take_ticket(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    counter = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")


type_callable(take_ticket)(_type_take_ticket)
_lower_builtin(take_ticket, types.Array)(_lower_take_ticket)
