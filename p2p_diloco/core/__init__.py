"""The values and rules of the project: what is computed and what is decided.

Everything else imports from here, and this imports from nothing else of ours. What computes and decides is pure:
records and times are its arguments. Beside it lies what all the others need of the system: a process and its signals,
a person's TOML and paths, the file of a key, a port that is tried, the event log. It never talks to a peer, and never
needs torch or hivemind.

Its files, from the bottom up:

    errors        every exception: ours against the peer's
    interpreter   how a Python process of ours begins: its imports, its output, its encoding
    interruption  Ctrl+C, SIGTERM and a closed terminal: when they may interrupt a command, and its exit code
    paths         paths that a person writes: `~`
    toml          TOML files that a person writes
    digest        the one hash: blake2b over pieces
    identity      one Ed25519 key per peer; sign and verify
    addresses     multiaddrs and HOST:PORT: check, sort, choose, encode
    listening     where a peer listens: which families and ports this machine has
    codec         what a codec is: one part of an outer gradient as bytes
    floats        codecs that keep floats: fp32, fp16
    blocks        codecs of small integers with a scale a block: int8, int4
    codecs        the codecs that a run may name
    grid          which values of all parameters are which part
    update        the update of an outer step: what names it, and its bytes
    norms         norms and inner products that are the same bits everywhere
    agreement     which contributions count, and how much of each
    aggregate     contributions to their mean, by the run's rule; the angle between one of them and it
    outer         the outer state, and how an update leads to the next one
    runfile       what a person writes about a run
    uplinks       what peers say of each other's uplinks, and what a group makes of it
    reach         which peers reach which, by the families of their addresses, and who is fit to average
    records       what a peer says about itself, signed
    invitation    what a run's owner signs for a volunteer: token, invitation, seat, revocations
    admission     who may take part in a run, and what counts as one
    manifest      what all peers of a run must agree on, signed by its owner
    config        what a peer chooses alone; all time-outs
    places        a bounded number of places for peers, and who makes room
    proven        which peers have answered since they last failed
    credit        what each peer may still cost
    directory     the newest record of every other peer; which to believe and wait for
    peer_row      a record as a table and JSON show it
    known         which peers are known at a head: those that have contributed to the updates before it
    roster        who may meet in a round: readiness, who leads, whom a leader takes in
    roster_rules  what a run says of rosters, and whether members fit it
    shares        how the parts are shared among those that reduce, by their uplinks
    group         a roster that its leader has signed, and what follows from it for all that read it
    signed_part   what senders and reducers sign of the parts that they send
    audit         whether a part is the mean of what was contributed, and the evidence where it is not
    certificate   who has made an update, and the signatures of most of them
    equivocation  proofs that a peer has signed two of what is signed once
    barred        the peers that are barred from a run, each with its proof
    lineage       a chain of headers and certificates, followed from one to the next
    anchor        the owner's word that a state belongs to the run's history
    swarm_head    which head is the swarm's; held-out losses
    electors      whose word counts about which branch is the swarm's
    call          when a round calls those who still train: as soon as enough are ready
    pace          how many inner steps a peer plans, and when its outer step is due
    recent        how long others have kept a peer waiting in recent rounds, and how long it waits because of that
    patience      how long a reducer waits for senders, those that were late before among them
    waiting       waits that end, and can be cancelled
    buckets       token buckets: a rate that is kept, and how often a peer may ask
    asked         whom a peer has asked of late
    findings      what a peer has found of others as reducers, and for how long
    moment        what every event has
    trust_event   the events about whom a peer believes
    event         the events of a peer, and the line that each is in its log
    totals        what a peer's events add up to
    events        the event log
"""
