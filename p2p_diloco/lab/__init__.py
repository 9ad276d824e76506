"""Swarms to study: simulations without a network, and real processes on this machine with faults from outside.

No peer of a real swarm imports it. It never has rules of its own for an outer step: those are ``core``'s.

Its files, from the bottom up:

    simulated_run      what is simulated: a run file, and what only simulations vary
    variants           what only studies do to outer gradients: pruning, two bits, other outer optimizers
    own_texts          text of one's own for every replica
    recount            what a swarm did, from its event logs
    simulation_result  what became of a simulation: its curve, `summary.json`, what a study takes of it
    checkpoint         where a simulation stood when it was interrupted
    trainers           the trainers of a simulation, and what they start from
    simulation         K replicas without a network, one outer step after another
    simulate           a simulation from its run file to its end
    study              a study: a file of arms and seeds
    report             results of a study to a table, a plot and raw figures
    experiment         all simulations of some studies, in processes
    faults             faults from outside: what is to be done to whom, and when
    namespaces         a network on this machine, with cables that can be pulled
    child              one peer on this machine, as the system sees it
    children           the seed and the trainers of a swarm on this machine
    injector           faults, carried out
    outcome            event logs to where trainers are now, and to `summary.json`
    screen             what `swarm` shows
    local              N peers on this machine
"""
