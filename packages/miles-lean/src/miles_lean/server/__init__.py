"""The HTTP service: bounded admission, deadlines, metrics, graceful drain; our own API and Kimina's."""
