"""Replies that are not an answer of the policy in the mode that was asked for."""

from collections import Counter

from tools.pairs.grade import NO_ANSWER, Verdict
from tools.pairs.pool import RunFailed
from tools.pairs.replies import CONTENT_FILTER, Reply

EMPTY_CONTENT, THOUGHT_ANYWAY = "empty_content", "thought_anyway"
UNUSABLE = {
    EMPTY_CONTENT: "no text (the content is null)",
    THOUGHT_ANYWAY: "thinking, although --thinking off asked for none",
    CONTENT_FILTER: "a text that a content filter had withheld or changed",
}


def unusable_reply(reply: Reply, thinking: str) -> Verdict | None:
    """Why a reply is not an answer of the policy in the mode that `thinking` asks for: no_answer with its reason."""
    if reply.finish_reason == CONTENT_FILTER:
        return Verdict(NO_ANSWER, None, CONTENT_FILTER)
    if reply.is_empty:
        return Verdict(NO_ANSWER, None, EMPTY_CONTENT)
    return Verdict(NO_ANSWER, None, THOUGHT_ANYWAY) if thinking == "off" and reply.has_thinking else None


class UnusableStreak:
    """Stops a run in which the first `limit` replies, or all replies, are unusable: the server is set up wrongly."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reasons: Counter[str] = Counter()
        self._num_usable = 0

    def note_usable(self) -> None:
        self._num_usable += 1

    def note(self, reason: str) -> None:
        """Count an unusable reply. Raises RunFailed at the limit."""
        self._reasons[reason] += 1
        if not self._num_usable and self._reasons.total() == self._limit:
            self._fail()

    def finish(self) -> None:
        """Raises RunFailed when there were replies and none of them was usable."""
        if self._reasons and not self._num_usable:
            self._fail()

    def _fail(self) -> None:
        what = "; ".join(f"{count} held {UNUSABLE[reason]}" for reason, count in self._reasons.most_common())
        raise RunFailed(
            f"the first {self._reasons.total()} replies cannot be used: {what}. Serve the model's non-thinking mode: a "
            "chat template that honours chat_template_kwargs.enable_thinking; or the key by which this server switches "
            """thinking off, such as --thinking server --extra-body '{"reasoning_effort": "none"}'; or a model that """
            "does not think. Then run again with the same --output: such replies are set aside and asked for again."
        )
