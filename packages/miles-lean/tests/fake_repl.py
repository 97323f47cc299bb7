"""A stand-in for the leanprover-community REPL: JSON commands from standard input, blank lines between, answers as JSON.

`#noise` prints what looks like an answer's end before the answer, `#die` ends, `#hang` sleeps, `#slow` takes a while.
"""

import json
import sys
import time

environments = 0
command = ""
for line in sys.stdin:
    if line.strip():
        command += line
        continue
    if not command.strip():
        continue
    asked = json.loads(command)
    command = ""
    text = asked["cmd"]
    if "#die" in text:
        sys.exit(3)
    if "#hang" in text:
        time.sleep(600)
    if "#noise" in text:
        print('\n\n{"not": "an answer"}\n\n{broken}\n', flush=True)
    if "env" in asked and asked["env"] >= environments:
        print(json.dumps({"message": "Unknown environment."}), end="\n\n", flush=True)
        continue
    answer: dict = {"env": environments}
    environments += 1
    messages = []
    for number, row in enumerate(text.split("\n"), 1):
        if "wrong" in row:
            pos = {"line": number, "column": row.index("wrong")}
            messages.append(
                {"severity": "error", "pos": pos, "endPos": None, "data": f"wrong, in environment {asked.get('env')}"}
            )
    if messages:
        answer["messages"] = messages
    print(json.dumps(answer, indent=1), end="\n\n", flush=True)
