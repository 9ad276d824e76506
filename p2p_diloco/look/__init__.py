"""Looking on: the table in a terminal, a swarm seen from outside, the monitor and its page, the doctor.

It never changes what it looks at: a monitor is a stranger that nobody sees, and what the doctor leaves behind is
nothing.

Its files, from the bottom up:

    network_findings  what measurements mean: findings about the network, and their remedies
    machine_findings  what a machine is good for in a run: findings about it
    machine_trial  a trial of this machine: device, memory, some inner steps
    network_trial  what can be measured of a run from outside: addresses, clocks, bandwidth
    listener    whether others reach this machine
    doctor  `p2p-diloco doctor`, top to bottom
    display     the live table; findings
    status      a look at a run from outside
    overview    the records of all peers to the swarm as a whole
    history     the curve and the pace, for as long as somebody watches
    exposition  an overview for Prometheus and for the page
    monitor     a run followed from outside, and shown over HTTP
    page/       the status page: HTML, CSS and JavaScript, as the browser gets them
"""
