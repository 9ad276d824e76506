"""Commands for the trained model: export, sample."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from p2p_diloco.cli.arguments import check_run_id, require
from p2p_diloco.cli.options import OUTPUT, Addresses, AtLeastOne, AtLeastZero, Output, not_negative
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.interruption import importing
from p2p_diloco.look.display import plain


def export(
    *,
    to: Path,
    folder: Path | None = None,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    step: AtLeastZero | None = None,
    output: Output = OUTPUT,
) -> None:
    """Write the trained model as a folder that transformers loads.

    Parameters
    ----------
    to
        The folder to write; an earlier export is replaced.
    folder
        A peer's folder, or that of one run in it. The peer may be running.
    initial_peers
        Instead of a folder: address of any peer that is in the run now.
    run_id
        Which run, where there are several.
    step
        Outer step to export; the newest by default. Only from a folder.
    """
    check_run_id(run_id)
    if (folder is None) == (not initial_peers):
        raise UsageError("give either --folder or --initial-peers")
    if folder is None and step is not None:
        raise UsageError("--step goes with --folder: a swarm serves its newest outer step")

    with importing("export"):
        from p2p_diloco.ledger.folder import find_run, load_state
    if folder is not None:
        find_run(folder, run_id)  # refuse it before torch is imported, which takes seconds
    with importing("export"):
        from p2p_diloco.learn.export import export_model, refuse_taken

    refuse_taken(to)
    with run_of(folder, initial_peers, run_id) as run:
        manifest, state = load_state(run, step)
        export_model(manifest, state.theta, to, step=state.step, head=state.head)
    print(f"{to}: outer step {state.step} of run {manifest.spec.name} {manifest.run_id}, head {state.head.hex()}")


def sample(
    *,
    export: Path | None = None,
    folder: Path | None = None,
    run_id: str | None = None,
    prompt: str | None = None,
    max_tokens: AtLeastOne = 200,
    temperature: Annotated[float, Parameter(validator=not_negative)] = 0.8,
    top_k: AtLeastOne | None = None,
    seed: Annotated[int, Parameter(validator=Number(gte=0, lt=2**64))] = 0,
    output: Output = OUTPUT,
) -> None:
    """Let a model write.

    Parameters
    ----------
    export
        A folder that p2p-diloco export wrote.
    folder
        Instead of that: a peer's folder, or that of one run in it.
    run_id
        Which run, where there are several.
    prompt
        Text to go on from. Without it, held-out text of the run, where that is the built-in text, is shown and gone on
        from; else the model begins a document.
    max_tokens
        Where to end, unless the model ends before.
    temperature
        0 takes the likeliest token every time.
    top_k
        Choose among so many tokens only.
    seed
        The same seed writes the same text.
    """
    check_run_id(run_id)
    if (folder is None) == (export is None):
        raise UsageError("give either --export or --folder")

    with importing("sample"):
        from p2p_diloco.learn.model import load_model
        from p2p_diloco.learn.prompt import builtin_prompt
        from p2p_diloco.learn.sample import generate, load_export, presented
        from p2p_diloco.ledger.folder import find_run, read_manifest

    held_out = ""
    if export is not None:
        model, tokenizer, info = load_export(export)
        held_out = info.prompt
    elif folder is not None:
        run = find_run(folder, run_id)
        model, tokenizer = load_model(run)
        held_out = builtin_prompt(read_manifest(run).spec.data) if prompt is None else ""
    begin = held_out if prompt is None else prompt
    pieces = generate(model, tokenizer, begin, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
    shown = (plain(piece, keep="\n\t") for piece in pieces)
    if prompt is None and held_out:
        write(presented(plain(held_out, keep="\n\t"), shown, sum(p.numel() for p in model.parameters())))
    else:
        write(shown)
        print()


def write(pieces: Iterable[str]) -> None:
    """Prints text as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)


@contextmanager
def run_of(folder: Path | None, initial_peers: Sequence[str], run_id: str | None) -> Iterator[Path]:
    """Yields the folder of a run: a peer's, or one that lasts as long as the block, with what a running swarm gives."""
    if folder is not None:
        from p2p_diloco.ledger.folder import find_run

        yield find_run(folder, run_id)
        return
    from p2p_diloco.core.config import PeerConfig
    from p2p_diloco.learn.swarm import Swarm

    require(initial_peers)
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-") as temporary:
        config = PeerConfig(
            folder=Path(temporary), initial_peers=tuple(initial_peers), run_id=run_id, client_mode=True, name="export"
        )
        with Swarm.join(config, role="seed") as swarm:
            run = swarm.folder
        yield run
