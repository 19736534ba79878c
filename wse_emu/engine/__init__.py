"""The order of things: which layer runs when, what is streamed, and what fits."""
