"""p2p-diloco: volunteers on the internet train one language model together. Start reading in ``train.py``."""

__version__ = "0.1.0"

SERVING = ("seed", "peer", "swarm", "monitor")
"""Commands that end when the user wants it: to be interrupted is no failure of theirs."""
LASTING = (*SERVING, "simulate", "experiment")
"""Commands that train or serve for hours: they go on when nobody reads any more what they print."""
