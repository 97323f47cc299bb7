"""A statement with a slot for its proof, and putting a proof into it.

The slot is found among the tokens of the source: at an explicit marker, at the one `sorry` that ends it, or after a final
`:= by` or `:=`. Text is never searched for ":=", which also stands in docstrings, binders with defaults and `let`.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

from miles_lean.lexer import Token, code_tokens, line_of, tokenize, unclosed
from miles_lean.scan import command_starts, commands

MARKER = "/-! proof -/"
"""Put this comment where the proof goes, when a statement's end does not tell."""

DECLARATIONS = ("theorem", "lemma", "example", "def", "instance", "abbrev")


@dataclass(frozen=True, slots=True)
class Statement:
    """A Lean source cut open at its proof: `before + proof + after` is the whole file.

    Example: Statement.parse("theorem t : 1 = 1 := by sorry").fill("rfl") is "theorem t : 1 = 1 := by\\n  rfl\\n".
    """

    before: str
    after: str
    mode: Literal["tactic", "term"]

    @classmethod
    def parse(cls, source: str) -> Statement:
        """Find the slot. Raises ValueError, saying what stands there instead, when there is none or more than one."""
        source = source.replace("\r\n", "\n")
        tokens = tokenize(source)
        if (open_token := unclosed(source)) is not None:
            line = line_of(source, open_token.start)
            raise ValueError(f"the statement's {open_token.kind} that starts on line {line} is never closed")
        markers = [token for token in tokens if token.kind == "doc" and token.text.split() == MARKER.split()]
        if len(markers) > 1:
            raise ValueError(f"{len(markers)} proof markers {MARKER!r}; exactly one is allowed")
        if markers:
            return cls._cut(source, tokens, markers[0].start, markers[0].stop)
        code = [token for token in tokens if token.is_code]
        sorries = [token for token in code if token.text == "sorry"]
        if len(sorries) == 1 and sorries[0] is code[-1]:
            return cls._cut(source, tokens, sorries[0].start, sorries[0].stop)
        if sorries:
            lines = ", ".join(str(line_of(source, token.start)) for token in sorries)
            raise ValueError(f"sorry on lines {lines}: put {MARKER!r} where the proof goes")
        if code and code[-1].text in (":=", "by"):
            return cls._cut(source, tokens, len(source), len(source))
        last = repr(code[-1].text) if code else "nothing"
        raise ValueError(f"the statement ends with {last}; it must end with ':= by', ':=' or 'sorry', or hold {MARKER!r}")

    @classmethod
    def _cut(cls, source: str, tokens: list[Token], start: int, stop: int) -> Statement:
        previous = [token for token in tokens if token.is_code and token.stop <= start]
        if not previous or previous[-1].text not in (":=", "by"):
            found = repr(previous[-1].text) if previous else "nothing"
            raise ValueError(f"the proof's place on line {line_of(source, start)} follows {found}; it must follow ':=' or 'by'")
        return cls(source[:start].rstrip(), source[stop:], "tactic" if previous[-1].text == "by" else "term")

    @property
    def signature(self) -> tuple[str, ...]:
        """The code tokens of the open declaration, from its keyword to the token before the slot."""
        texts = [token.text for token in code_tokens(self.before)]
        starts = [index for index, text in enumerate(texts) if text in DECLARATIONS]
        return tuple(texts[starts[-1] :]) if starts else tuple(texts)

    @property
    def name(self) -> str:
        """The declared name; "" for an example."""
        signature = self.signature
        return signature[1] if len(signature) > 1 and signature[0] not in ("example",) and signature[1] not in (":", "(") else ""

    @property
    def challenge(self) -> str:
        """The whole source with `sorry` in the slot: what the judge compares a solution with."""
        return f"{self.before} sorry\n{self.after.lstrip(chr(10))}"

    def solution(self, submission: str, kind: Literal["tactics", "file"] = "tactics", sentinel: str = "") -> str:
        """The whole file to be judged. "tactics": tactics, or a term, for the slot; "file": a file that restates everything.

        With a sentinel's name, a theorem of that name follows a filled slot: if it is missing after compiling, the file was
        not read to its end. Raises ValueError as `fill` does.
        """
        if kind == "file":
            return submission.replace("\r\n", "\n")
        tail = f"\ntheorem _root_.{sentinel} : _root_.True := _root_.True.intro\n" if sentinel else ""
        return self.fill(submission) + tail

    def fill(self, proof: str) -> str:
        """The whole source with the proof in its slot, tactics indented by two spaces.

        Raises ValueError for an empty proof, one that leaves a comment or string open, and one that starts a new command.
        """
        proof = textwrap.dedent(proof.replace("\r\n", "\n")).strip("\n").rstrip()
        if not code_tokens(proof):
            raise ValueError("the proof is empty")
        if (open_token := unclosed(proof)) is not None:
            raise ValueError(
                f"the proof's {open_token.kind} that starts on line {line_of(proof, open_token.start)} is never closed"
            )
        if found := commands(proof):
            raise ValueError(f"the proof starts a command of its own, {found[0]}; only the proof itself goes into the slot")
        if self.mode == "term" and code_tokens(proof)[0].text == "by":
            body = proof
        elif self.mode == "term":
            body = "\n" + _indent(proof)
        else:
            first = code_tokens(proof)[0]
            body = "\n" + _indent(textwrap.dedent(proof[first.stop :]).strip("\n").lstrip(" ") if first.text == "by" else proof)
        glue = " " if not body.startswith("\n") else ""
        return f"{self.before}{glue}{body}\n{self.after.lstrip(chr(10))}"

    def proof_in(self, source: str) -> str:
        """The proof that a source gives for this statement: what follows the same declaration, token for token.

        Space and comments may differ; declarations before and after are left out. Raises ValueError when the source does
        not restate the declaration exactly once, changes tactics for a term, or gives no proof.
        """
        source = source.replace("\r\n", "\n")
        signature = self.signature
        bare = signature[:-1] if signature[-1] == "by" else signature
        tokens = code_tokens(source)
        texts = [token.text for token in tokens]
        starts = [index for index in range(len(texts) - len(bare) + 1) if tuple(texts[index : index + len(bare)]) == bare]
        if len(starts) != 1:
            what = "does not restate" if not starts else f"restates {len(starts)} times"
            raise ValueError(f"the output {what} {' '.join(bare[:2])} as it was given")
        end = starts[0] + len(bare)
        if self.mode == "tactic" and end < len(tokens) and tokens[end].text == "by":
            end += 1
        elif self.mode == "tactic":
            raise ValueError(f"the output proves {self.name or 'the statement'} by a term; the statement ends with ':= by'")
        rest = source[tokens[end - 1].stop :]
        following = command_starts(rest)
        proof = rest[: following[0][1]] if following else rest
        if not code_tokens(proof):
            raise ValueError(f"the output states {self.name or 'the statement'} but proves nothing")
        return textwrap.dedent(proof.strip("\n").rstrip())


def _indent(proof: str) -> str:
    """Two spaces before every line that a string or comment does not continue."""
    inside = {
        line
        for token in tokenize(proof)
        if token.kind in ("string", "comment", "doc")
        for line in range(line_of(proof, token.start) + 1, line_of(proof, token.stop) + 1)
    }
    return "\n".join(
        line if not line.strip() or number in inside else "  " + line for number, line in enumerate(proof.split("\n"), 1)
    )
