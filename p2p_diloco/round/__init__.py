"""One attempt at an outer step: who meets, the butterfly, and how all come to the same update.

A failed round is a value. It never touches the disk and never changes the outer state: whoever asked for the round
applies what comes of it.

Its files, from the bottom up:

    missed         a round that did not commit, as a value
    seat           this peer, as its own network side sees it
    here           what all parts of one peer share: network, key, records, seat, clock
    company        whom a peer may form a round with: who ranks first, who has failed it
    gathering      the rounds that a peer leads while they are formed, and when they close
    matchmaking    the roster of a round: whom a peer asks to lead, what it answers who asks
    meeting        one round at one member: who meets, what it holds, whom it lost
    butterfly      one all-reduce: some parts, among some members of a round
    settle_decide  what makes a commit, which wait ends, whose word fits the round: pure decisions
    settle_member  one member: it follows a leader, takes one commit, and fetches what it misses
    settle_leader  the leader: it collects receipts, decides, and gives the commit to everybody
    settle         how the members of a round agree on its outcome: the rules, and who leads next
"""
