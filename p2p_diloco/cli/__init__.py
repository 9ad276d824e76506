"""The command line: what a person gave is checked, one command runs, and it ends in an exit code.

Nothing imports it but ``__main__``. It never computes anything about training.

Its files, from the bottom up:

    options          options that several commands have, and where their values come from
    arguments        what commands were given, checked before anything is started
    description      what `manifest` says of a run, or of a run file
    commands_join    `seed`, `peer`, `swarm`
    commands_invite  `invite`, `revoke`
    commands_look    `status`, `monitor`, `doctor`, `manifest`
    commands_model   `export`, `sample`
    commands_study   `simulate`, `experiment`
    commands_verify  `verify`, for a run on this disk
    cli              the command line: which commands there are, and how they end
"""
