"""A training loop of your own in a swarm: plain SGD with momentum instead of AdamW, on batches drawn your way.

    python peers/custom_loop.py --initial-peers /ip4/.../p2p/12D... --folder my-peer

Only four calls matter: ``load_into``, ``report``, ``outer_step_due`` and ``outer_step``. How a peer learns between two
outer steps is its own business; it meets the peers that run ``p2p-diloco peer`` like any other.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import numpy as np
import torch

from p2p_diloco.core.config import PeerConfig
from p2p_diloco.learn.model import losses_of, model_of
from p2p_diloco.learn.swarm import Swarm
from p2p_diloco.learn.train import open_run_corpus


def main(initial_peers: list[str], folder: Path) -> None:
    with Swarm.join(PeerConfig(folder=folder, initial_peers=tuple(initial_peers))) as swarm:
        spec = swarm.manifest.spec
        rows, seq_len = spec.inner.batch_size, spec.data.seq_len
        text = open_run_corpus(swarm.manifest, own_data=None, peer_id=swarm.peer_id).train
        generator = np.random.default_rng()
        model = model_of(swarm.manifest)
        swarm.load_into(model)  # theta; from here on the parameters are in memory shared with the network process
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        while not swarm.done:
            starts = generator.integers(len(text) - seq_len, size=rows)
            batch = np.stack([text[start : start + seq_len + 1] for start in starts]).astype(np.int64)
            losses = losses_of(model, torch.from_numpy(batch))  # batch: [rows, seq_len + 1]
            losses.trained.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.inner.clip)
            optimizer.step()
            optimizer.zero_grad()

            swarm.report(losses.cross_entropy.item(), tokens=rows * seq_len)
            if swarm.outer_step_due():
                result = swarm.outer_step(model)
                met = f"group of {result['group']}" if result["committed"] else result["reason"]
                print(f"outer step {swarm.step} of {spec.outer.steps}: {met}, loss {swarm.loss:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A training loop of your own in a swarm.")
    parser.add_argument("--initial-peers", nargs="+", required=True, help="addresses of peers or of the seed")
    parser.add_argument("--folder", type=Path, required=True, help="for this peer's identity, ledger and event log")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        main(arguments.initial_peers, arguments.folder)
