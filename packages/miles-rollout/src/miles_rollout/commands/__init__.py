"""The sub-commands of `miles-rollout`; each imports what it needs when it runs."""
