"""One attempt at an outer step: who meets, the butterfly, and how all come to the same update.

A failed round is a value. It never touches the disk and never changes the outer state: whoever asked for the round
applies what comes of it.

Its files, from the bottom up:

    outcome                what comes of a round, as a value: a certified update, or why there is none
    seat                   this peer, as its own network side sees it
    here                   what all parts of one peer share: network, key, records, seat, clock
    measured               how fast others send, as this peer has measured in its last rounds
    helper                 the owner's seed as a helper: whether it is there, and leads before the trainers
    company                whom a peer may form a round with: who ranks first, who has failed it
    calls                  the first words with a peer while a round is formed, and how long it has for its answer
    callers                the peers that call the others to a round, as one peer's records have them
    gathering              one round that is being formed, as its leader sees it
    gatherings             the rounds that a peer leads while they are formed, and when they open and close
    notices                what a leader says to those that are not ready, and what it hears from them
    matchmaking            the roster of a round: whom a peer asks to lead, what it answers who asks
    kept                   the contributions that a reducer keeps, so that others can look at them
    signatures             which commits the members of a round have signed, and whether it is void
    meeting                one round at one member: who meets, what it holds, whom it lost
    tries                  the streams of one member to another one: one and, where that closed at once, a second one
    intake                 what comes to one reducer in a butterfly: the contributions of each sender
    butterfly              one all-reduce: some parts, among some members of a round
    settle_decide          which commit a leader proposes, who signs it, which wait ends, whose word fits: all pure
    settle_ballot          the signatures over one commit, and the owner's witness where that is needed
    settle_eta             how whoever waits hears that its answer still comes
    settle_completion      the parts of a commit that a member misses: fetched, checked, made an update
    settle_pledge          what a member signs, one commit a round, and what it takes for certified
    settle_member          one member: it follows one leader after another, and takes a commit
    settle_member_answers  what a member answers to contributions, and to who asks for a part or a commit
    settle_hearing         what a leader hears before it decides: receipts, and what was signed before
    settle_leader          the leader: it proposes a commit, and has it certified
    settle_leader_answers  what a leader tells each member that gives it a receipt
    settle_once            no two updates of one round: who applies one tells the others first
    rosters                no two rounds of one leader: those beside a round are asked for its roster
    settle                 how the members of a round agree on its outcome: the rules, and who leads next
"""
