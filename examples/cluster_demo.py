"""A whole pipeline on a cluster of one machine: two workers of Dask do the stages before training, two ranks train.

    python examples/cluster_demo.py tiny --runs runs/cluster-demo

Whatever it starts it stops, however it ends. Needs slipstream[dask].
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys

from distributed import LocalCluster


def main() -> int:
    """Start workers, run a pipeline on them and on ranks, stop them; returns the exit status of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?", default="tiny")
    parser.add_argument("--runs", default="runs/cluster-demo")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leave through every `with`
    with LocalCluster(
        n_workers=asked.workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        print(f"scheduler  {cluster.scheduler_address}, {asked.workers} workers")
        print(f"dashboard  {cluster.dashboard_link}", flush=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked.ranks}"]
        run = ["-m", "slipstream", "run", asked.pipeline, "--runs", asked.runs]
        engine = ["--set", "engine.kind=dask", "--set", f"engine.address={cluster.scheduler_address}"]
        with subprocess.Popen([*torchrun, *run, *engine]) as ranks:
            try:
                return ranks.wait()
            finally:
                ranks.terminate()  # torchrun passes it on


if __name__ == "__main__":
    sys.exit(main())
