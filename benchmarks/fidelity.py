"""How near does a hypergradient come to the exact one, by rounding and by the estimator's own bias?

    python benchmarks/fidelity.py [--quick] [--json PATH] [--peers-python PATH]

Rounding: every estimator on every engine, in fp64, fp32 and bf16, against the same estimator written in plain torch in
fp64 in one process on the whole batch: relative error, and for bf16 the cosine with the fp32 result. The problems are
a softmax regression, with dense linear algebra as the reference, and a small decoder whose examples a net weighs, with
autograd through everything as the reference. Some way off the optimum, where the lower gradient is no rounding error:
SAMA divides by it.

Bias: on the softmax regression near its optimum, where the lower level is strongly convex, against ``-M^T H^-1 v``
with the dense Hessian at the same weights. Beside scalemlo's estimators stand those of the peers, on the same problem
with as many iterations. CPU-seconds are those of one hypergradient, the direct gradient included; on a problem this
small they are overhead.
"""

import json
import statistics
from functools import partial
from typing import Any

import measure
import torch
import torch.nn.functional as F
from fidelity_problems import (
    ADAMW,
    DAMPING,
    DECODER_RATE,
    DECODER_STEPS,
    DENSE,
    ITERATIONS,
    NEAR,
    PROBLEMS,
    RANK,
    SOLVES,
    STEP,
    WARM_UP,
    dense,
    flat_of,
    gaussian_like,
    move,
    one_step,
    regression,
    regression_lower_loss,
    regression_upper_loss,
    unrolled,
)
from torch import Tensor
from torch.distributed.tensor import DTensor


def program_of(problem: str, name: str, spec: Any, dtype: torch.dtype, **point: float) -> Any:
    """A program at the point of the problem; its upper level stays there."""
    import scalemlo as mlo
    from scalemlo.hypergradients import SAMA, SOBA, ConjugateGradient, Identity, Neumann, Nystrom, Unrolled

    make, lower_loss, upper_loss = PROBLEMS[problem]
    lower, upper, train, meta = make(dtype, **point)
    estimators = {
        "Identity": Identity(),
        "SAMA": SAMA(),
        "Neumann": Neumann(num_terms=ITERATIONS, step_size=STEP),
        "ConjugateGradient": ConjugateGradient(max_steps=ITERATIONS, tolerance=None),
        "Nystrom": Nystrom(rank=RANK, damping=DAMPING),
        "SOBA": SOBA(step_size=STEP),
        "Unrolled": Unrolled(),
    }

    class Lower(mlo.Level):
        def loss(self, batch, upper):
            return lower_loss(self.module, upper, batch)

    class Upper(mlo.Level):
        def loss(self, batch, lower):
            return upper_loss(lower, batch)

    rate = STEP if problem == "regression" else DECODER_RATE
    optimizer = partial(torch.optim.AdamW, **ADAMW) if name == "SAMA" else partial(torch.optim.SGD, lr=rate)
    steps = ITERATIONS if problem == "regression" else DECODER_STEPS
    data = [train]
    if name == "SAMA":
        data = [*zip(*(t.chunk(WARM_UP + 1)[:WARM_UP] for t in train), strict=True), train]
    levels = [
        Upper("upper", upper, data=[meta], optimizer=partial(torch.optim.SGD, lr=0.0)),
        Lower("lower", lower, data=data, optimizer=optimizer, hypergradient=estimators[name],
              unroll_steps=steps if name == "Unrolled" else 1),
    ]  # fmt: skip
    program = mlo.Program(levels, engine=spec)
    if name == "SAMA":
        program.run(WARM_UP, progress=False)
    return program


def full(trainer, shards) -> Tensor:
    """A vector put together from its shards, flat, fp64; in the order of the module's parameters."""
    tensors = (trainer.engine.from_local(n, shards[n].double()) for n in trainer.block.names)
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([t.detach().flatten() for t in whole])


def hypergradient(program, name: str) -> Tensor:
    """Of the upper level, flat."""
    for _ in range(SOLVES if name == "SOBA" else 1):
        gradient = program.gradients()["upper"]
    return full(program.trainers["upper"], gradient)


def reference(problem: str, name: str, program, dtype: torch.dtype) -> Tensor:
    """The same estimator in fp64 on the whole batch, at the weights and moments that the program holds."""
    make, lower_loss, upper_loss = PROBLEMS[problem]
    lower, upper, train, meta = make(dtype)  # rounded to it
    lower.double(), upper.double()
    if problem == "regression":
        train, meta = ((x.double(), y) for x, y in (train, meta))
    losses = lower_loss, upper_loss, train, meta
    if name == "Unrolled":
        steps, rate = (ITERATIONS, STEP) if problem == "regression" else (DECODER_STEPS, DECODER_RATE)
        return unrolled(lower, upper, *losses, steps, rate)
    if problem == "decoder":
        return one_step(lower, upper, *losses)
    trainer = program.trainers["lower"]
    move(lower, full(trainer, trainer.weights()) - flat_of(lower))
    h, m, g, v = dense(lower, upper, train, meta)
    extra: dict[str, Any] = {"g": g}
    if name == "SAMA":
        states = {n: trainer.optimizer_state(n) for n in trainer.block.names}
        extra["moments"] = {k: full(trainer, {n: states[n][k] for n in states}) for k in ("exp_avg", "exp_avg_sq")}
    if name == "Nystrom":  # its test vectors are drawn in fp32 whatever the weights are
        extra["draws"] = torch.stack([gaussian_like(lower, seed) for seed in range(RANK)], dim=1)
    return -m.T @ DENSE[name](h, v, **extra)


def rounding(engines: list[str]) -> list[dict]:
    """Errors of everything on the ranks of this process's group."""
    import scalemlo as mlo

    specs = {"Single": mlo.Single, "DDP": mlo.DDP, "FSDP": mlo.FSDP}
    found = []
    for engine in engines:
        for problem, names in (("regression", [*DENSE, "Unrolled"]), ("decoder", ["Identity", "Unrolled"])):
            for name in names:
                row = {"engine": engine, "problem": problem, "name": name}
                for dtype in (torch.float64, torch.float32):
                    program = program_of(problem, name, specs[engine](), dtype)
                    single = hypergradient(program, name)
                    expected = reference(problem, name, program, dtype)
                    row[str(dtype).removeprefix("torch.")] = float((single - expected).norm() / expected.norm())
                reduced = hypergradient(program_of(problem, name, specs[engine](dtype="bf16"), torch.float32), name)
                row["bf16"] = float(F.cosine_similarity(reduced, single, dim=0))
                found.append(row)
    return found


def bias() -> list[dict]:
    """Every estimator against the exact implicit hypergradient, fp64, one process."""
    import scalemlo as mlo

    found = []
    for name in (*DENSE, "Unrolled"):
        program = program_of("regression", name, mlo.Single(), torch.float64, distance=NEAR)
        estimate = hypergradient(program, name)
        lower, upper, train, meta = regression(torch.float64, NEAR)
        trainer = program.trainers["lower"]
        move(lower, full(trainer, trainer.weights()) - flat_of(lower))
        seconds = statistics.median(measure.cpu_seconds(program.gradients) for _ in range(5))
        num_hvps = program.step().get("hvps/lower", 0) * (SOLVES if name == "SOBA" else 1)
        found.append(
            {"name": name, "num_hvps": int(num_hvps), "seconds": seconds}
            | _compare(estimate, lower, upper, train, meta)
        )
    return found


def peer_bias() -> list[dict]:
    """The peers' estimators."""
    import peers

    torch.set_num_threads(1)
    options = dict(iterations=ITERATIONS, alpha=STEP, rank=RANK, rho=DAMPING)
    found = []
    for name, estimator in peers.HYPERGRADIENT_PEERS.items():
        lower, upper, train, meta = regression(torch.float64, NEAR)
        run = partial(
            estimator, lower, upper, partial(regression_lower_loss, batch=train),
            partial(regression_upper_loss, batch=meta), **options,
        )  # fmt: skip
        try:
            estimate = run()
        except peers.Unsupported as reason:
            found.append({"name": name, "unsupported": str(reason)})
            continue
        flat = torch.cat([estimate[n].detach().flatten() for n, _ in upper.named_parameters()])
        seconds = statistics.median(measure.cpu_seconds(run) for _ in range(5))
        found.append({"name": name, "seconds": seconds} | _compare(flat, lower, upper, train, meta))
    return found


def _compare(estimate: Tensor, lower, upper, train, meta) -> dict[str, float]:
    h, m, _, v = dense(lower, upper, train, meta)
    exact = -m.T @ torch.linalg.solve(h, v)
    cosine = float(F.cosine_similarity(estimate, exact, dim=0))
    return {"cosine": cosine, "error": float((estimate - exact).norm() / exact.norm())}


# ---- the tables ------------------------------------------------------------------------------------------------------
def worker(kind: str, cases: dict[str, list[str]]) -> list[dict]:
    """Everything of scalemlo, each number of ranks in processes of its own, on some engines; or the peers."""
    if kind == "peers":
        return peer_bias()
    import scalemlo  # noqa: F401  before the forks, once for all

    found = []
    for num_ranks, engines in cases.items():
        rows = measure.on_ranks(int(num_ranks), rounding, engines)
        found += [row | {"kind": "rounding", "num_ranks": num_ranks} for row in rows]
    return found + [row | {"kind": "bias"} for row in measure.on_ranks(1, bias)]


def main() -> None:
    """Run, print the tables, write the figures."""
    options = measure.arguments(__doc__)
    if options.worker:
        print(json.dumps(worker(**json.loads(options.worker))))
        return
    from scalemlo.reporting.tables import markdown_table

    cases = {"1": ["Single"], "2": ["DDP", "FSDP"]}
    if not options.quick:
        cases = {"1": ["Single", "FSDP"], "2": ["DDP", "FSDP"], "4": ["DDP", "FSDP"]}
    run = partial(measure.in_fresh_process, __file__, measure.STEADY_TIME, cases=cases)
    own, theirs = run(kind="scalemlo"), run(kind="peers", python=options.peers_python)
    rounded = [row for row in own if row["kind"] == "rounding"]
    biases = [row for row in own if row["kind"] == "bias"]
    print(f"{measure.machine()}; one thread per rank; {ITERATIONS} iterations, step {STEP}, rank {RANK}\n")
    print("Rounding: relative error against the same estimator in fp64; for bf16 the cosine with fp32.\n")
    columns = ("problem", "name", "engine", "num_ranks")
    rows = [
        [*(row[c] for c in columns), f"{row['float64']:.1e}", f"{row['float32']:.1e}", f"{row['bf16']:.5f}"]
        for row in sorted(rounded, key=lambda row: (row["problem"] != "regression", row["name"]))
    ]
    print(markdown_table([*columns[:3], "ranks", "fp64", "fp32", "bf16"], rows))
    print("\nBias: against the exact implicit hypergradient.\n")
    rows = []
    for package, results in (("scalemlo", biases), ("", theirs)):
        for row in results:
            label = f"{package} {row['name']}".strip()
            if "unsupported" in row:
                rows.append([label, row["unsupported"], "", "", ""])
                continue
            numbers = [f"{row['cosine']:.4f}", f"{row['error']:.1e}", row.get("num_hvps", "")]
            rows.append([label, *numbers, f"{row['seconds']:.4f}"])
    print(markdown_table(["estimator", "cosine", "relative error", "products", "CPU-s"], rows))
    figures = {
        "worst_relative_error_fp64": max(row["float64"] for row in rounded),
        "worst_relative_error_fp32": max(row["float32"] for row in rounded),
        "worst_cosine_bf16": min(row["bf16"] for row in rounded),
    }
    figures |= {f"cosine_{row['name']}": row["cosine"] for row in biases}
    measure.write_figures(options.json, {name: float(f"{value:.6g}") for name, value in figures.items()})


if __name__ == "__main__":
    main()
