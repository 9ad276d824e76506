"""How peers reach each other: messages, streams, p2pd and the DHT. hivemind is imported in this package alone.

Bytes from strangers are bounded and checked here before anybody else sees them. It never knows what a round or an
update is for.

Its files, from the bottom up:

    traffic          bytes by purpose, and streams that others spoiled, counted
    connections      which connections have failed, as their streams tell
    message          what every message of our streams is
    round_messages   those about a round: gathering, reducing, settling
    audit_messages   those by which what reducers have done is looked at
    state_messages   those about what peers hold: updates, snapshots, records, the manifest
    anchor_messages  those about the anchors of the run's owner
    proof_messages   those by which peers find out who lies, and give each other proofs
    probe_messages   those by which peers measure each other
    messages         all of them by their tags, the bytes of each, and those that answer anything
    channel          our streams: frames, time-outs, counted bytes
    guard            parent of p2pd: nothing outlives the network process
    kademlia         our node of the DHT: whose records it takes, what it answers strangers
    hardening        limits put on hivemind
    daemon           one life of p2pd: started, asked, shut
    dht              our place in the DHT: neighbours, records stored and looked up
    slots            which streams of others a peer takes, and which makes room
    streams          a node's streams: limited, served, ended
    node             one peer on the network: its p2pd, its place in the DHT, its streams
    discovery        from one address to a run
"""
