"""What an assistant says, as OpenAI writes it: content, reasoning and tool calls, whole or piece by piece."""

from __future__ import annotations

from typing import Any

from penstock.serve.sse import to_json
from penstock.serve.texts import Text

ROLE = b'{"role":"assistant","content":""}'
NOTHING = b"{}"


class Speech:
    """One text's. A text goes into `pieces` bit by bit, or into `message` at its end."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self.called = False

    def pieces(self, new: str, last: bool) -> list[bytes]:
        """Deltas, as JSON."""
        return [b'{"content":%b}' % to_json(new)] if new else []

    def message(self, whole: str) -> dict[str, Any]:
        return {"role": "assistant", "content": whole, "refusal": None}

    def finish(self, text: Text) -> tuple[str | None, str | int | None]:
        """Why it ended: for its calls where it made any."""
        if text.finish == "stop" and self.called:
            return "tool_calls", text.stop_reason
        return text.finish, text.stop_reason
