"""A training loop of your own in a swarm: plain SGD with momentum instead of AdamW, on batches drawn your way.

    python peers/custom_loop.py --initial-peers /ip4/.../p2p/12D... --folder my-peer

Only four calls matter: ``load_into``, ``report``, ``outer_step_due`` and ``outer_step``. How a peer learns between two
outer steps is its own business; it meets the peers that run ``p2p-diloco peer`` like any other.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch

from p2p_diloco import LocalError, PeerConfig, Swarm, evaluate_theta, losses_of, model_of, open_run_corpus


def train(config: PeerConfig, data: Path | None) -> None:
    with Swarm.join(config) as swarm:
        spec = swarm.manifest.spec
        rows, seq_len = spec.inner.batch_size, spec.data.seq_len
        corpus = open_run_corpus(swarm.manifest, own_data=data, peer_id=swarm.peer_id)
        generator = np.random.default_rng()
        model = model_of(swarm.manifest)
        swarm.load_into(model)  # theta; from here on the parameters are in memory shared with the network process
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        while not swarm.done:
            # 1. Learn alone.
            starts = generator.integers(len(corpus.train) - seq_len, size=rows)
            batch = np.stack([corpus.train[start : start + seq_len + 1] for start in starts]).astype(np.int64)
            losses = losses_of(model, torch.from_numpy(batch))  # batch: [rows, seq_len + 1]
            losses.trained.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.inner.clip)
            optimizer.step()
            optimizer.zero_grad()

            # 2. Tell the swarm.
            swarm.report(losses.cross_entropy.item(), tokens=rows * seq_len)
            if not swarm.outer_step_due():
                continue

            # 3. Offer what I learned, take what the group learned; evaluate theta, if it is my turn.
            result = swarm.outer_step(model)
            met = f"group of {result.group}" if result.committed else result.reason
            print(f"outer step {swarm.step} of {spec.outer.steps}: {met}, loss {swarm.loss:.3f}", flush=True)
            if result.reason == "diverged":
                optimizer.state.clear()
            evaluate_theta(swarm, model, corpus)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A training loop of your own in a swarm.")
    parser.add_argument("--initial-peers", nargs="+", required=True, help="addresses of peers or of the seed")
    parser.add_argument("--folder", type=Path, required=True, help="for this peer's identity, ledger and event log")
    parser.add_argument("--data", type=Path, help="your own text, for runs without built-in text: a file or folder")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        train(PeerConfig(folder=arguments.folder, initial_peers=arguments.initial_peers), arguments.data)
    except KeyboardInterrupt:
        pass  # the swarm has been told
    except LocalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
