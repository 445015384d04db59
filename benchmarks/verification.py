"""What does it cost that hypergradients are verified against the live model?

    python benchmarks/verification.py [--quick] [--json PATH]

Weights of examples for a randomly initialised Llama, all of its weights trained, one process. ``step`` is an outer step
with ``verify="off"``; ``verified`` one with ``verify="always"``, where everything is compared at every step as it
otherwise is at first use. Time is CPU-seconds, the median over rounds of ratios measured side by side, alternating.
``amortised`` is what comparing costs every ``verify_every`` = 1000 outer steps, in per cent of those steps. Whether
weights and records of the two runs are the same bit for bit is in the last column.
"""

import statistics
from functools import partial
from typing import Any

import hvp
import measure

FULL = hvp.FULL | dict(vocab_size=1000, hidden_size=256, intermediate_size=704, length=128, rounds=7)
QUICK = hvp.QUICK | dict(rounds=3)
EVERY = 1000
AIMS = "aims: at most 0.5 % amortised, bits equal"


def estimators() -> dict[str, Any]:
    """One of each kind that is verified in its own way, and the steps of a lower level per outer step."""
    import scalemlo as mlo

    return {
        "products": (mlo.Identity(), 1),
        "forward": (mlo.Identity(mixed="forward"), 1),
        "sama": (mlo.SAMA(), 1),
        "neumann": (mlo.Neumann(num_terms=3, step_size=0.1), 1),
        "unrolled": (mlo.Unrolled(), 2),
    }


def program_of(setting: dict, estimator: Any, unroll_steps: int, verify: Any) -> Any:
    """Two levels: one weight for each example, and the language model."""
    import torch
    from torch import nn

    import scalemlo as mlo

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(hvp.BATCH))

        def forward(self):
            return self.logits.sigmoid()

    def losses(model: Any, ids: Any) -> Any:
        logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)

    class Weigh(mlo.Level):
        def loss(self, batch, finetune):
            return mlo.mean(losses(finetune, batch))

    class Finetune(mlo.Level):
        def loss(self, batch, weigh):
            return mlo.weighted_mean(losses(self.module, batch), weigh(), normalize=False)

    model, ids = hvp.problem({k: v for k, v in setting.items() if k != "rounds"})
    adamw = partial(torch.optim.AdamW, lr=1e-4)
    levels = [
        Weigh("weigh", Weights(), data=[ids], optimizer=adamw),
        Finetune("finetune", model, data=[ids], optimizer=adamw, unroll_steps=unroll_steps, hypergradient=estimator),
    ]
    return mlo.Program(levels, engine=mlo.Single(), verify=verify)


def measured(setting: dict, name: str) -> dict[str, float]:
    """Ratios and whether bits are equal, for one estimator."""
    import torch

    estimator, unroll_steps = estimators()[name]
    plain, verified = (program_of(setting, estimator, unroll_steps, verify) for verify in ("off", "always"))
    plain.step()
    verified.step()
    pairs = []
    for i in range(setting["rounds"]):
        seconds = {}
        for program in (plain, verified)[:: 1 if i % 2 else -1]:
            seconds[program] = measure.cpu_seconds(program.step)
        pairs.append((seconds[plain], seconds[verified]))
    states = [program.state_dict("finetune") | program.state_dict("weigh") for program in (plain, verified)]
    same = all(torch.equal(states[1][key], t) for key, t in states[0].items())
    return {
        "step_seconds": statistics.median(a for a, _ in pairs),
        "verified_over_step": statistics.median(b / a for a, b in pairs),
        "bits_equal": float(same and plain.history.steps == verified.history.steps),
    }


def main() -> None:
    """Measure, print a table, write the figures."""
    args = measure.arguments(__doc__)
    setting = QUICK if args.quick else FULL
    figures: dict[str, float] = {}
    print(f"{measure.machine()}; {AIMS}\n")
    print("| estimator | CPU-s per step | verified / step | amortised | bits equal |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("products", "forward", "sama", "neumann", "unrolled"):
        found = measure.on_ranks(1, measured, setting, name)
        found["amortised_percent"] = 100 * max(found["verified_over_step"] - 1, 0) / EVERY
        figures |= {f"{name}/{key}": value for key, value in found.items()}
        cells = [f"{found['step_seconds']:.3f}", f"{found['verified_over_step']:.2f}"]
        cells += [f"{found['amortised_percent']:.2f} %", "yes" if found["bits_equal"] else "no"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    measure.write_figures(args.json, figures)


if __name__ == "__main__":
    main()
