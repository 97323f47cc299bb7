"""A draft model that is trained beside the policy and published with it."""
