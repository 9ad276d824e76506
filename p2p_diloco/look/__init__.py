"""Looking on: the table in a terminal, a swarm seen from outside, the monitor and its page, the doctor.

It never changes what it looks at: a monitor is a stranger that nobody sees, and what the doctor leaves behind is
nothing.

Its files, from the bottom up:

    display           the live table of a peer
    status            a look at a run from outside
    overview          the records of all peers to the swarm as a whole
    ways_in           for whom a line to join works, and what to do so that it works for all
    history           the curve and the pace, for as long as somebody watches
    page_view         what the page asks for
    exposition        an overview for Prometheus, and all that the monitor serves
    monitor           a run followed from outside, and shown over HTTP
    page/             the status page: HTML, CSS and JavaScript, as the browser gets them
    request           what the doctor is asked about: the options of a peer
    findings          what was measured, and the remedy; the list that the doctor shows
    network_findings  what measurements of the network mean
    network_trial     a trial of the network: addresses, clocks, bandwidth, whether others reach this machine
    machine_findings  what measurements of this machine mean
    machine_trial     a trial of this machine: device, memory, some inner steps
    doctor            `p2p-diloco doctor`, top to bottom
"""
