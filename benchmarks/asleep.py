"""A peer that sleeps where others compute, so that many fit on a few cores: ``python -m benchmarks.asleep peer``.

It has the options of ``p2p-diloco peer``, joins and leaves like it. An inner step takes a fixed time.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from p2p_diloco.cli import cli
from p2p_diloco.core.interruption import Stop
from p2p_diloco.learn import train
from p2p_diloco.learn.swarm import Swarm

INNER_STEP_S = 0.05


def sleep_and_drift(swarm: Swarm) -> None:
    """Until the run is over. Every inner step moves a share of the parameters a little, so that all have moved by the
    outer step. The model is one vector: to make the run's would take longer than all else that a start computes."""
    swarm.begin()
    model = torch.nn.ParameterList([torch.from_numpy(swarm.local)])
    generator = np.random.default_rng()
    shares = np.array_split(np.arange(len(swarm.local)), swarm.manifest.spec.inner.steps)
    while not swarm.done:
        time.sleep(INNER_STEP_S)
        share = shares[swarm.inner_step % len(shares)]
        drift = generator.standard_normal(len(share), np.float32)
        swarm.local[share[0] : share[-1] + 1] += np.float32(1e-3) * drift
        swarm.report(0.0, swarm.manifest.spec.tokens_per_inner_step)
        if swarm.outer_step_due():
            swarm.outer_step(model)


def train_asleep(swarm: Swarm, choices: train.TrainConfig, stop: Stop) -> None:
    sleep_and_drift(swarm)


if __name__ == "__main__":
    train.train = train_asleep
    sys.exit(cli.main())
