"""The network side of one peer: its life, what it serves others, how it follows the swarm, its metrics.

It runs in the network process, or in memory in tests. It never imports torch, and never trains.

Its files, from the bottom up:

    control      what trainer and network process say to each other
    handout      which donor of a download is asked for which item
    download     chunks or updates from several donors at a time
    donors       which peers serve what, and the way that one of them shows
    partners     chunks from those who download the same snapshot
    chains       the chain from a donor, verified before anything is taken along it
    snapshots    a snapshot from donors: which one to believe, its index, its chunks
    catchup      how it goes there: chain, updates and snapshots from donors
    turns        who has one of a donor's upload slots, and when it loses it
    uploads      what a donor sends to those who catch up
    upkeep       snapshots in time, damage found and mended, bits compared with the others'
    families     who is needed, and who misses what, where peers have IPv4 or IPv6 alone
    pushes       its record sent straight to others, who answer with theirs
    presence     what a peer makes known about itself: records published and pushed
    revocations  which tokens the run's owner has revoked: heard of, kept, passed on
    anchoring    the anchors of the run's owner: made, heard of, kept, served
    proofs       who is barred and with which proof: kept, told, heard of
    follower     when a peer goes to where the swarm is, and when it gives that up
    probes       what others may measure with a peer: dial backs, transfers, its clock
    audits       what others have reduced, looked at; what was found of them, passed on
    witness      the run's owner signs updates that too few known members make
    reception    streams that others open, and who answers them
    round_event  the event of one attempt at an outer step
    attempts     one round at a time: gathered, reduced, settled, and its update committed
    outer_steps  a trainer's outer steps: rounds tried until one commits, or the swarm's state taken
    helping      how the owner's seed leads and averages for trainers that not all can dial
    peer         the network side of one peer, on any transport: its parts and its life
    web          a small HTTP server that strangers may reach
    metrics      one peer's metrics for Prometheus
    trainer      the trainer, as its network process sees it: lines from it and to it
    network      the network process
"""
