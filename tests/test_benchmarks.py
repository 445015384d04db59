"""The benchmarks run in their quick form, and what they claim about exactness holds."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def figures(name: str, folder: Path) -> dict[str, float]:
    """Run a benchmark in an interpreter without peers and return its figures."""
    path = folder / "figures.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json", str(path)]
    command += [] if name in ("bilevel_tax", "gallery") else ["--peers-python", sys.executable]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| --- |" in result.stdout
    found = json.loads(path.read_text())
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values()), found
    return found


@pytest.mark.full
def test_hessian_vector_products(tmp_path):
    found = figures("hvp", tmp_path)
    for place in ("single", "fsdp1", "fsdp2"):
        assert found[f"remat_over_checkpointed_{place}"] > 1
        assert found[f"remat_over_gradient_{place}"] > 1
        assert found[f"retain_further_over_gradient_{place}"] > 0.5
    for place in ("fsdp1", "fsdp2"):  # counts do not depend on the machine
        assert found[f"remat_held_units_{place}"] <= 2.1
        assert found[f"remat_num_collectives_{place}"] > 0
        assert found[f"remat_collective_mebibytes_{place}"] > 0
    assert found["worst_relative_error"] < 1e-5


@pytest.mark.full
def test_shard_scaling(tmp_path):
    pytest.importorskip("deepspeed")
    found = figures("shard_scaling", tmp_path)
    for place in ("fsdp_w2", "zero3_w2", "zero3_offload_w2"):
        assert found[f"over_ideal_{place}"] < 1.05
    assert found["over_ideal_zero1_w2"] > found["over_ideal_zero2_w2"] > 1.05  # whole gradients, whole weights
    for place in ("fsdp_w2", "zero3_w2"):
        assert found[f"error_{place}"] < 1e-5
        assert found[f"held_units_{place}"] <= 2.1


@pytest.mark.full
def test_fidelity(tmp_path):
    found = figures("fidelity", tmp_path)
    assert found["worst_relative_error_fp64"] < 1e-10
    assert found["worst_relative_error_fp32"] < 1e-5
    assert found["worst_cosine_bf16"] > 0.95
    for name in ("Identity", "SAMA", "Neumann", "ConjugateGradient", "Nystrom", "SOBA", "Unrolled"):
        assert -1.0 <= found[f"cosine_{name}"] <= 1.0 + 1e-9
    assert found["cosine_ConjugateGradient"] > 0.9999


@pytest.mark.full
def test_bilevel_tax(tmp_path):
    found = figures("bilevel_tax", tmp_path)
    assert {"tax_exact_unroll1", "tax_fd_unroll1", "tax_ghost_unroll1", "peak_over_plain"} <= found.keys()


@pytest.mark.full
def test_residency(tmp_path):
    found = figures("residency", tmp_path)
    assert found["bits_equal"] == 1.0
    assert found["within/growth_bytes"] <= 1.1 * found["within/budget_bytes"] < found["without/growth_bytes"]
    given, chosen = (found[f"{name}/moved_bytes"] for name in ("within, levels in the given order", "within"))
    assert 0 < chosen < given


@pytest.mark.full
def test_kept_weights(tmp_path):
    found = figures("kept_weights", tmp_path)
    assert found["bits_equal"] == 1.0 and found["kept_bytes"] > 0
    assert found["gathered_bytes_ratio"] < 0.3


@pytest.mark.full
def test_plan_accuracy(tmp_path):
    found = figures("plan_accuracy", tmp_path)
    assert found["median_relative_error"] <= found["worst_relative_error"] < 0.15  # 10 MiB of workspaces, small models


@pytest.mark.full
@pytest.mark.parametrize("name", ["billion", "faults", "gallery", "beside_betty", "simulated_models"])
def test_other_benchmarks_run(name, tmp_path):
    assert figures(name, tmp_path)


@pytest.mark.full
def test_verification(tmp_path):
    found = figures("verification", tmp_path)
    for name in ("products", "forward", "sama", "neumann", "unrolled"):
        assert found[f"{name}/bits_equal"] == 1.0
        assert found[f"{name}/amortised_percent"] < 0.5
