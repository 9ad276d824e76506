"""The trainer: text, model, inner steps, and the handle on the swarm. Start reading in ``train.py``.

Here torch begins. It never opens a stream to another peer: what it wants of the swarm goes through ``process``.

Its files, from the bottom up:

    textreport    what was read of a run's text, and what was skipped
    textfiles     a path to the files below it that hold text
    text          files of text to documents
    hub           names on the Hugging Face hub to documents, tokenizers, models
    tokenizer     text to tokens and back: bytes, or the tokenizers library
    source        where a run's documents come from
    data          documents to tokens on disk to batches
    prompt        held-out text for a model to go on from
    settings      which keys a transformers config can have
    architecture  the run file's model to a full transformers config
    parameters    a model's parameters, and one vector that holds the same values
    model         manifest to transformers model, and its loss
    rehearsal     a model is tried as a peer will use it, before a run starts with it
    genesis       starting a run: manifest and first state
    export        theta to a folder that transformers loads
    sample        a model to text
    inner         learning alone: AdamW, its schedule, its state on disk
    process       the network process, as its trainer holds it
    speed         how fast a trainer makes inner steps
    inner_steps   what a trainer's inner steps come to: tokens, loss, speed
    shared        memory that a trainer and its network process share
    swarm         the handle that a trainer holds on the swarm
    keeper        a trainer's inner state, written to the disk beside training
    train         one peer, top to bottom: start reading here
"""
