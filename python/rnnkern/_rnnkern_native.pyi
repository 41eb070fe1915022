"""
The compiled kernels. Arguments are checked strictly; rnnkern.layers is the friendly side.
"""
from __future__ import annotations
import collections.abc
import numpy
import typing
__all__: list[str] = ['FrozenCall', 'Packed', 'Reserve', 'Saved', 'Steps', 'Worth', 'cells', 'compiler', 'decide', 'engine', 'frozen_call', 'isa', 'isas', 'lanes', 'limit_caller', 'linear', 'measure', 'next_retreat', 'num_threads', 'pack', 'private_cache', 'reserve', 'run', 'set_num_threads', 'stream', 'sum_of_squares', 'supply', 'use_engine', 'use_isa', 'wait_at_start']
class Saved:
    """
    What a training forward keeps for backward.
    """
    @property
    def nbytes(self) -> int:
        """
        Bytes of saved gates.
        """
class Reserve:
    """
    Memory that a layer keeps for its next call.
    """
    def release(self) -> None:
        """
        Gives up what no call is at work in.
        """
    @property
    def nbytes(self) -> int:
        ...
class Packed:
    """
    The weights of a stack, packed for the ISA that was active when it was made.
    """
    def backward(self, saved: Saved, dy: typing.Any, dlast: typing.Any, need_x: bool, need_state: bool, gradients: typing.Any, bound: tuple[str, typing.SupportsFloat | typing.SupportsIndex] | None, saturated: collections.abc.Sequence[tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex]] | None, flow: typing.Any, dx: typing.Any) -> tuple:
        ...
    def forward(self, request: typing.Any) -> tuple:
        ...
    def plan(self, steps: typing.SupportsInt | typing.SupportsIndex, batch: typing.SupportsInt | typing.SupportsIndex, save: typing.Any, backward: bool, offsets: typing.Any = None) -> dict:
        ...
    @property
    def isa(self) -> str:
        ...
    @property
    def names(self) -> tuple:
        ...
    @property
    def nbytes(self) -> int:
        ...
class FrozenCall:
    """
    Inference with the weights of a frozen layer.
    """
    def run(self, x: typing.Any, state: typing.Any, lengths: typing.Any, offsets: typing.Any, resets: typing.Any, out: typing.Any) -> typing.Any:
        ...
class Steps:
    """
    The states of sequences that go on step by step.
    """
    def step(self, x_t: typing.Any, out: typing.Any) -> numpy.ndarray:
        ...
    @property
    def last(self) -> typing.Any:
        """
        The states before the last step and its x_t, copied; None before the first step.
        """
    @property
    def state(self) -> tuple:
        """
        Copied both ways.
        """
    @state.setter
    def state(self, arg1: typing.Any) -> None:
        ...
class Worth:
    """
    Whether helpers are worth their barriers where steps are short, see policy.h; in ns.
    """
    def __init__(self) -> None:
        ...
    def found(self, step_ns: typing.SupportsFloat | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, alone_ns: typing.SupportsFloat | typing.SupportsIndex, together_ns: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    def next(self, step_ns: typing.SupportsFloat | typing.SupportsIndex, steps: typing.SupportsInt | typing.SupportsIndex, meetings: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        0: alone, 1: with helpers, 2: measured.
        """
    def tried(self) -> None:
        ...
def cells() -> list:
    """
    What the compiled module knows of each cell.
    """
def decide(threads: typing.SupportsInt | typing.SupportsIndex, expected_ns: typing.SupportsInt | typing.SupportsIndex, since_last: typing.SupportsInt | typing.SupportsIndex, cpus: typing.SupportsInt | typing.SupportsIndex, runnable: typing.SupportsInt | typing.SupportsIndex, awake: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, bool]:
    """
    How many helpers a call asks for, and whether it asks again on its way, by policy.h.
    """
def engine() -> str:
    """
    What multiplies bfloat16 numbers: 'none', 'pairs', or a matrix engine, 'emulated' or 'amx', with '-fp16' if that multiplies float16 too.
    """
def frozen_call(packed: Packed, friendly: typing.Any, batch_first: bool) -> FrozenCall:
    ...
def isa() -> str:
    """
    The ISA in use.
    """
def isas() -> list[tuple[str, bool]]:
    """
    Compiled ISAs, best first, and whether this CPU runs each.
    """
def lanes(dtype: typing.Any) -> int:
    """
    Elements of a vector of the ISA in use.
    """
def limit_caller(count: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def linear(x: typing.Any, weight: typing.Any, bias: typing.Any, y: typing.Any, dy: typing.Any, dx: typing.Any, dweight: typing.Any, dbias: typing.Any, rounds: bool, engines: bool) -> None:
    ...
def measure(name: str, cell: str, repeats: typing.SupportsInt | typing.SupportsIndex, elements: typing.SupportsInt | typing.SupportsIndex, threads: typing.SupportsInt | typing.SupportsIndex, runs: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, list[tuple[float, int]]]:
    """
    Times a loop that only the machine limits, for rnnkern.limits.
    """
def next_retreat(before: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    How many calls do without helpers after a crowded one.
    """
def num_threads() -> int:
    ...
def pack(stack: tuple[str, str, bool, bool, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, collections.abc.Sequence[bool]], names: tuple, weights: typing.Any, training: bool) -> Packed:
    ...
def private_cache() -> int:
    """
    Bytes of a core's private cache, as the plans reckon with it.
    """
def reserve() -> Reserve:
    ...
def run(stack: tuple[str, str, bool, bool, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, collections.abc.Sequence[bool]], names: tuple, weights: typing.Any, request: typing.Any) -> tuple:
    ...
def set_num_threads(count: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def stream(packed: Packed, batch: typing.SupportsInt | typing.SupportsIndex, arguments: typing.Any) -> Steps:
    ...
def sum_of_squares(arrays: list) -> float:
    """
    In float64, the elements of a row first and then the rows; the same on any number of threads.
    """
def supply() -> tuple[int, int]:
    """
    The CPUs of this machine, and the threads on it that have one or wait for one now, 0 where that is not known.
    """
def use_engine(best: str) -> str:
    """
    The best that may, where it is there, for what is packed from now on.
    
    Returns what was best before.
    """
def use_isa(name: str) -> None:
    """
    Packs weights for another ISA from now on.
    """
def wait_at_start(helpers: typing.SupportsInt | typing.SupportsIndex, woken: typing.SupportsInt | typing.SupportsIndex, expected_ns: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    How many ns a call waits at its start for its helpers, some of which had to be woken.
    """
compiler: str = 'GCC 12.2.0'
