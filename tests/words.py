"""What tests of messages compare: key words, and not sentences."""

from __future__ import annotations

import re


def in_order(words: str, message: str) -> bool:
    """Whether a message has these words, in this order, whatever stands between them."""
    pattern = ".*".join(re.escape(word) for word in words.split())
    return re.search(pattern, message, re.IGNORECASE | re.DOTALL) is not None
