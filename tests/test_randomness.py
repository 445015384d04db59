"""Every pass of one step sees the same dropout masks, and passes in between change nothing."""

import torch

import scalemlo as mlo
from tests.problems import (
    Dropped,
    Finetune,
    Rate,
    assert_same,
    build_modules,
    relative_error,
    sgd,
    token_batch,
    weights,
)
from tests.test_gradients import direction


def dropping_program(hypergradient: mlo.Hypergradient) -> mlo.Program:
    lower, upper = build_modules("mlp", torch.float64)
    finetune = Finetune("finetune", Dropped(lower), data=[token_batch(i) for i in range(4)], optimizer=sgd,
                        hypergradient=hypergradient)  # fmt: skip
    finetune.normalize = False
    return mlo.Program([Rate("rater", upper, data=[token_batch(9)], optimizer=sgd), finetune])


def test_masks_are_those_of_the_step():
    """Exact derivatives and central differences agree only if all their passes drop the same units."""
    program = dropping_program(mlo.Identity())
    program.run(1, progress=False)
    trainer, rater = program.trainers["finetune"], program.trainers["rater"]
    found = {}
    for method in ("forward", "finite_difference"):
        trainer.estimator = mlo.Identity(mixed=method)
        found[method] = trainer.compute_mixed(direction(trainer), [rater])["rater"]
    assert relative_error(found["finite_difference"], found["forward"]) < 1e-6
    again = trainer.compute_mixed(direction(trainer), [rater])["rater"]
    assert_same(dict(again), dict(found["finite_difference"]), 0.0)
    trainer._seed += 1  # other masks
    other = trainer.compute_mixed(direction(trainer), [rater])["rater"]
    assert relative_error(other, found["forward"]) > 1e-2


def test_hypergradients_in_between_change_no_trajectory():
    def run(*callbacks):
        program = dropping_program(mlo.SAMA())
        before = torch.get_rng_state()
        history = program.run(4, callbacks=callbacks, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        return history.column("loss/finetune"), weights(program)

    def peek(program, record):
        trainer, rater = program.trainers["finetune"], program.trainers["rater"]
        trainer.compute_mixed(direction(trainer), [rater])
        rater.compute_gradient([trainer])

    losses, state = run()
    peeked_losses, peeked = run(peek)
    assert peeked_losses == losses
    assert_same(peeked, state, 0.0)
    torch.rand(7)  # the seed of the program decides, not the state of the global generator
    assert run()[0] == losses
