"""The comparison with Betty runs in its quick form, without Betty too, and its batches are whole epochs."""

import sys

import pytest
import torch

from tests.test_benchmarks import BENCHMARKS, figures


@pytest.fixture
def reweighting(monkeypatch):
    """The module that sets the runs up."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import reweighting

    yield reweighting
    del sys.modules["reweighting"]


def test_every_epoch_takes_every_example_at_most_once(reweighting):
    order = reweighting.epochs(num_examples=10, batch_size=3, steps=7)
    assert order.shape == (7, 3)
    for epoch in (order[:3], order[3:6]):
        assert len(epoch.unique()) == 9
    assert not torch.equal(order[:3], order[3:6])


def test_every_step_of_a_task_trains(reweighting, tmp_path):
    """The file gives the same run twice, and the classifier learns."""
    path = tmp_path / "task.pt"
    reweighting.write_task("label noise", 0, 30, path, tiny=True)
    ends = []
    for _ in range(2):
        task = torch.load(path, weights_only=False)
        before = reweighting.accuracy(task.classifier, task.test)
        reweighting.train_scalemlo(task, "identity", 1e-3)(30)
        ends.append(torch.cat([p.detach().flatten() for p in task.classifier.parameters()]))
    assert torch.equal(*ends)
    assert reweighting.accuracy(task.classifier, task.test) > before + 20


@pytest.mark.full
def test_beside_betty(tmp_path):
    found = figures("beside_betty", tmp_path)
    for name in ("long_tail", "label_noise", "weak_labels"):
        assert 0 < found[f"accuracy_end_scalemlo_{name}"] <= 100
        assert found[f"milliseconds_identity_{name}"] > 0
