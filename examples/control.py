"""Balances a pole whose velocity nobody tells: a recurrent policy, many environments as rows, resets at their ends.

    python examples/control.py                half a minute: a report, and control.png
    python examples/control.py --quick        seconds

A cart moves on a rail and carries a pole. The policy sees where both are, not how fast they move, so that one picture
is not enough to know what to do. It learns by imitation: it acts, and an expert that sees the velocities says what it
would have done (DAgger, Ross et al. 2011). Beside it learns a policy without memory, the same layers with a reset at
every step. Ctrl-C ends the training, and what is learned by then is shown. The page is docs/examples/control.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnkern as rk

Array = NDArray[Any]

STEP, GRAVITY, CART, POLE, HALF = 0.02, 9.8, 1.0, 0.1, 0.5  # s, m/s^2, kg, kg, m: the cart-pole of Barto et al. 1983
FORCE, RAIL, ANGLE = 10.0, 2.4, 0.4  # newtons at most; metres and radians beyond which an episode ends
LONGEST = 500  # steps of an episode
SCALE = np.array([1 / RAIL, 1 / ANGLE], np.float32)  # of what the policy sees


def accelerate(state: Array, force: Array) -> Array:
    """Rates of change (B, 4) of place, velocity, angle and angular velocity."""
    _, velocity, angle, turning = state.T
    pushed = (force + POLE * HALF * turning**2 * np.sin(angle)) / (CART + POLE)
    inertia = HALF * (4 / 3 - POLE * np.cos(angle) ** 2 / (CART + POLE))
    turned = (GRAVITY * np.sin(angle) - np.cos(angle) * pushed) / inertia
    moved = pushed - POLE * HALF * turned * np.cos(angle) / (CART + POLE)
    return np.stack([velocity, moved, turning, turned], 1)


class Environments:
    """Carts and poles side by side, each begun again where its episode has ended."""

    def __init__(self, count: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.state = np.empty((count, 4))
        self.steps = np.zeros(count, int)
        self.ended = np.ones(count, bool)
        self._begin()

    def _begin(self) -> None:
        """Begin a new episode where the last one has ended."""
        self.state[self.ended] = self.random.uniform(-1, 1, (int(self.ended.sum()), 4)) * [0.5, 0.5, 0.15, 0.5]
        self.steps[self.ended] = 0

    @property
    def seen(self) -> Array:
        """What the policy sees (B, 2): place and angle, as shares of what is allowed."""
        return self.state[:, [0, 2]].astype(np.float32) * SCALE

    def step(self, action: Array) -> None:
        """Push by actions (B,) in [-1, 1], with gusts, and begin again where an episode ends, as `ended` says."""
        force = FORCE * np.clip(action, -1, 1) + self.random.normal(0, 1, len(action))
        self.state += STEP * accelerate(self.state, force)
        self.steps += 1
        fallen = (abs(self.state[:, 0]) > RAIL) | (abs(self.state[:, 2]) > ANGLE)
        self.ended = fallen | (self.steps == LONGEST)
        self._begin()


def expert_gains() -> Array:
    """Gains (4,) of the linear-quadratic regulator, which sees all four, by iterating Riccati's equation."""
    small = 1e-5
    rates = [accelerate(np.eye(4)[[index]] * small, np.zeros(1))[0] / small for index in range(4)]
    a = np.eye(4) + STEP * np.stack(rates, 1)
    b = STEP * accelerate(np.zeros((1, 4)), np.full(1, small)).T / small * FORCE
    cost, p = np.diag([1.0, 0.1, 10.0, 0.1]), np.eye(4)
    for _ in range(1000):
        gains = np.linalg.solve(1 + b.T @ p @ b, b.T @ p @ a)
        p = cost + a.T @ p @ (a - b @ gains)
    found: Array = gains[0]
    return found


@dataclass
class Policy:
    """A model that acts, and which ends of episodes its state is told of."""

    name: str
    colour: str
    resets: Callable[[Array], Array]  # from `ended` (B,)
    model: rk.Sequential = field(init=False)
    optimizer: rk.Adam = field(init=False)
    held: list[float] = field(default_factory=list)  # mean steps of an episode, after each round

    def __post_init__(self) -> None:
        self.model = rk.Sequential(rk.GRU(2, 32, seed=0), rk.Linear(32, 1, seed=1))
        self.optimizer = rk.Adam(self.model, lr=3e-3)

    def act(self, seen: Array, state: Any, ended: Array) -> tuple[Array, Any]:
        """Actions (B,) at this step, and the state after it."""
        y, state = self.model(seen[None], state, resets=self.resets(ended)[None])
        return y[0, :, 0], state


def roll_out(policy: Policy, gains: Array, rows: int, steps: int, seed: int, trust: float) -> tuple[Array, ...]:
    """Steps (T, B) of what was seen, where an episode began, and what the expert would have done.

    In a share `trust` of the rows the policy acts, in the others the expert.
    """
    environments, state = Environments(rows, seed), None
    seen, began, wanted = [], [], []
    follows = np.arange(rows) < trust * rows
    for _ in range(steps):
        began.append(environments.ended)
        seen.append(environments.seen)
        action, state = policy.act(seen[-1], state, began[-1])
        wanted.append(np.clip(-environments.state @ gains, -1, 1))
        environments.step(np.where(follows, action, wanted[-1]))
    return np.stack(seen), np.stack(began), np.stack(wanted)[..., None].astype(np.float32)


def learn(policy: Policy, rounds: list[tuple[Array, ...]], updates: int, generator: np.random.Generator) -> float:
    """Follow the expert on random rows of all rounds; the mean loss."""
    losses = []
    for _ in range(updates):
        seen, began, wanted = rounds[generator.integers(len(rounds))]
        y, _, tape = policy.model.forward(seen, resets=policy.resets(began))
        loss, dy = rk.mse(y, wanted)
        grads = policy.model.backward(tape, dy, need_x=False)
        rk.clip_grad_norm(grads, 1.0)
        policy.optimizer.step(grads)
        losses.append(loss)
    return float(np.mean(losses))


def evaluate(act: Callable[[Array, Any, Array], tuple[Array, Any]], rows: int, seed: int) -> tuple[float, Array]:
    """Mean steps that an episode lasts, of LONGEST, and the angles (LONGEST, B), NaN when it has ended."""
    environments, state = Environments(rows, seed), None
    alive, lasted, angles = np.ones(rows, bool), np.zeros(rows), np.full((LONGEST, rows), np.nan)
    for step in range(LONGEST):
        angles[step] = np.where(alive, environments.state[:, 2], np.nan)
        action, state = act(environments.seen, state, environments.ended)
        environments.step(action)
        lasted += alive
        alive &= ~environments.ended
    return float(lasted.mean()), angles


def draw(policies: list[Policy], angles: dict[str, Array], path: Path) -> None:
    """How long the pole stood by rounds of learning, and its angle in twelve episodes of each policy at the end."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no picture without matplotlib: python -m pip install matplotlib")
        return
    figure, (left, *others) = plt.subplots(1, 1 + len(policies), figsize=(11, 3.6), layout="constrained")
    left.axhline(LONGEST, color="#bbbbbb", linestyle="--", label="expert, sees velocities")
    for policy, axis in zip(policies, others, strict=True):
        left.plot(range(1, len(policy.held) + 1), policy.held, "o-", color=policy.colour, label=policy.name)
        axis.plot(
            np.arange(LONGEST) * STEP, np.degrees(angles[policy.name][:, :12]), color=policy.colour, linewidth=0.8
        )
        axis.set(
            title=policy.name, xlabel="seconds", ylabel="angle (degrees)", xlim=(0, LONGEST * STEP), ylim=(-24, 24)
        )
    left.set(title="time that the pole stands", xlabel="round", ylabel="steps, of 500", ylim=(0, LONGEST * 1.05))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False, fontsize=9)
    for axis in (left, *others):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of acting and learning, for each policy")
    parser.add_argument("--rows", type=int, default=64, help="environments side by side")
    parser.add_argument("--quick", action="store_true", help="6 rounds")
    parser.add_argument(
        "--out", type=Path, default=Path("control"), metavar="FOLDER", help="for the picture and the model"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds = 6
    options.out.mkdir(parents=True, exist_ok=True)
    gains = expert_gains()
    policies = [Policy("GRU", "#1f6fa8", lambda ended: ended), Policy("without memory", "#c8581a", np.ones_like)]
    try:
        for policy in policies:
            generator, rounds = np.random.default_rng(0), []
            for index in range(options.rounds):
                rounds.append(roll_out(policy, gains, options.rows, 200, seed=index, trust=0.75 if index else 0))
                loss = learn(policy, rounds, 20, generator)
                policy.held.append(evaluate(policy.act, options.rows, seed=1000)[0])
                print(
                    f"{policy.name:14} round {index + 1:2}  loss {loss:.3f}  {policy.held[-1]:5.1f} steps", flush=True
                )
    except KeyboardInterrupt:
        print("interrupted")
    angles = {}
    print(f"{4 * options.rows} new episodes of at most {LONGEST} steps; for how many the pole stands:")
    for policy in policies:
        steps, angles[policy.name] = evaluate(policy.act, 4 * options.rows, seed=2000)
        print(f"  {policy.name:14}  {steps:.1f}")
    print("and percent of the episodes in which it stands to the end:")
    for name, one in angles.items():
        print(f"  {name}, to the end  {100 * np.isfinite(one[-1]).mean():.1f}")
    rk.save_model(options.out / "control.npz", policies[0].model)
    draw(policies, angles, options.out / "control.png")


if __name__ == "__main__":
    main()
