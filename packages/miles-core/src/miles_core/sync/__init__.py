"""Weight publishing from a trainer to an engine: manifest, transfer, verification."""
