"""How drafts are made: a cheaper view of the target, on the target's own KV cache."""
