"""Miles' rollout service: wire records, engines, tokenizers, HTTP server and client. Importing it pulls in no torch."""

__version__ = "0.1.0"
