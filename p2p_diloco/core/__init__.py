"""The values and rules of the project: what is computed and what is decided, without network, disk or clock.

Everything else imports from here, and this imports from nothing else of ours. Decisions are pure functions of their
arguments, time among them. It never opens a socket, never needs torch, and keeps no state of a running peer.

Its files, from the bottom up:

    errors        every exception: ours against the peer's
    interpreter   how a Python process of ours begins: its imports, its output, its encoding
    toml          TOML files that a person writes
    paths         paths that a person writes: `~`
    identity      one Ed25519 key per peer; sign and verify
    codec         one part of an outer gradient as bytes: fp32, fp16, int8, int4
    outer         the outer state, the update, and how one follows from the other
    alignment     how one outer gradient lies to the mean of all
    manifest      what all peers of a run must agree on; the run file
    config        what a peer chooses alone; all time-outs
    addresses     multiaddrs: check, sort, encode
    endpoint      HOST:PORT of what is served over HTTP
    records       what a peer says about itself, signed; the directory of all
    rounds        every decision of a round, as pure functions
    waiting       waits that end, and can be cancelled
    rate          a rate that is kept: a token bucket
    quota         how often a peer may ask: a token bucket each
    totals        what the event log has said, added up
    events        the event log
    interruption  Ctrl+C, SIGTERM and a closed terminal: when they may interrupt a command, and what exit code they make
"""
