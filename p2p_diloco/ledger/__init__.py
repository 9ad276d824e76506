"""What a peer keeps on disk: snapshots of the outer state and the updates since, and its copy in memory.

What it gives back it has verified. It never talks to anybody, and never decides which history is the swarm's.

Its files, from the bottom up:

    disk        how a file gets there whole or not at all, and stays there
    snapshot    one outer state as a file, whole or not at all
    files       the files of a ledger, by name, and where those go that do not belong there
    chain       header and certificate of every update, from the genesis on
    updates     the updates that a ledger holds
    ledger      snapshots, updates and the chain on disk
    replay      a later state from a snapshot and the updates since, part by part
    comparison  a state in memory against what the files lead to
    history     what the chain says about outer steps that are behind
    replica     this peer's copy of the outer state, in memory and on disk
    folder      a run as it lies in a peer's folder
    anchors     the owner's anchors, from the first one on
    verify      the whole check of a run as it lies on a disk
    seats       a peer's seat, the owner's invitations, and revocations
    found       what a peer has found of reducers, on disk
    proofs      proofs against peers that are barred
"""
