"""`uncompiled` and `constant`, which keep `torch.compile` out of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

__all__ = ["constant", "uncompiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """A decorator: what a function gives for the same arguments is the same, so that torch calls it while it compiles.

    As `torch.compiler.assume_constant_result`, without the time to import Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uncompiled(*, inner: bool = True) -> Callable[[Function], Function]:
    """A decorator: let a function run as it is where torch compiles what calls it, and what it calls if `inner`.

    Without the time of `torch.compiler.disable`: to import Dynamo, and of each call.
    """

    def mark(function: Function) -> Function:
        if not hasattr(eval_frame, "set_code_exec_strategy"):  # PyTorch 2.6
            return torch.compiler.disable(function, recursive=inner)
        skip, default = eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
        strategy = eval_frame._FrameExecStrategy(skip, skip if inner else default)
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
        return function

    return mark
