"""The Triton kernels compiled for real devices: launched as always on a driver that only compiles, no warning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton")

PROGRAM = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

compiled = {}
launch = JITFunction.run

def only_compile(kernel, *args, warmup, **options):
    assembly = launch(kernel, *args, warmup=True, **options).asm
    target = assembly["ptx"].split(".target ")[1].split()[0]
    compiled.setdefault(kernel.__name__, []).append([target, len(assembly["cubin"])])

triton.runtime.driver.set_active(Driver())
JITFunction.run = only_compile
from slipstream.embedding.rules import OPTIMIZERS
from slipstream.embedding.tiers import kernels
for dim, dtype, weights in ((3, torch.int32, None), (128, torch.int64, torch.ones(20))):
    buffer, state, gradients = torch.zeros(50, dim), torch.zeros(50), torch.zeros(20, dim)
    kernels.gather_rows(buffer, torch.arange(20), torch.zeros(30, dtype=dtype))
    for rule in (each() for each in map(OPTIMIZERS.get, OPTIMIZERS.names()) if each.has_kernel):
        kernels.update_rows(
            rule, buffer, [state] if rule.state else [], torch.arange(20), gradients,
            lr=torch.tensor(0.1), sample_weights=weights, first_spare=40,
        )
from slipstream.embedding.tiers import finding_kernels, summing_kernels, triton_plan
from slipstream.embedding.tiers.rows import TieredRows
for dim, rules in ((3, ["rowwise_adagrad"]), (128, OPTIMIZERS.names())):
    for rule in rules:
        rows = TieredRows(
            num_rows=50, num_hot=10, embedding_dim=dim, num_staged=40, optimizer=rule, device=torch.device("cpu"),
            keeps_lead=True,
        )
        plans = [
            triton_plan.TritonPlan(rows, rows.on_host, num_lookups=300, most_distinct=20, half=half)
            for half in (0, 1)
        ]
        plans[0].find(plans[1])
        plans[0].fetch()
        plans[0].look_up(300)
        plans[0].sum_by_row(torch.zeros(300, 4))
        plans[0].update(
            rows.rule(), torch.zeros(300, dim), lr=torch.tensor(0.1), num_steps=torch.ones((), dtype=torch.float64),
            sample_weights=torch.ones(21) if dim > 3 else None,
        )
        plans[0].write_back()
        plans[1].take_over(plans[0])
from slipstream.training import dense_kernels
for rule in ("sgd", "adagrad", "adam"):
    layers = [torch.zeros(3, 700), torch.zeros(5)]
    update = dense_kernels.FusedUpdate(layers, OPTIMIZERS.get(rule)())
    for weight, decay in ((None, 0.0), (torch.ones(()), 0.1)):
        update(
            torch.zeros(2105), [torch.zeros(2105)] * len(OPTIMIZERS.get(rule).state), lr=torch.tensor(0.1),
            num_steps=torch.ones((), dtype=torch.float64), sample_weight=weight, weight_decay=decay,
        )
parts = (kernels, finding_kernels, summing_kernels, dense_kernels)
launched = [value for part in parts for value in vars(part).values()]
helpers = {"_sum_run"}  # called by kernels
every = sorted({each.__name__ for each in launched if isinstance(each, JITFunction)} - helpers)
print(json.dumps({"compiled": compiled, "every": every}))
"""


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles_without_a_warning(architecture: int, tmp_path: Path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}  # nothing that was compiled before counts
    del environment["TRITON_INTERPRET"]
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(architecture)]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    found = json.loads(answer.stdout)
    assert sorted(found["compiled"]) == found["every"]
    for target, num_bytes in (each for variants in found["compiled"].values() for each in variants):
        assert target.startswith(f"sm_{architecture}") and num_bytes > 0
