"""Ways of running Lean behind one protocol."""

from miles_lean.backends.base import Backend, Capabilities, CompileResult, Message, Outcome
from miles_lean.backends.discover import find_backend

__all__ = ["Backend", "Capabilities", "CompileResult", "Message", "Outcome", "find_backend"]
